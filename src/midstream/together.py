"""Several coroutines at once, of which none outlives the others' failure."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

T = TypeVar("T")


async def together(works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All results, in order. The first failure cancels the others, waits for them, and is raised.

    The caller's own cancellation does the same, and is what is raised though one fails in that moment. Each is
    cancelled once, so that its own ending is not cut short.
    """
    cancelled_before = cancellations()
    tasks = [asyncio.create_task(work) for work in works]
    try:
        return list(await asyncio.gather(*tasks))
    except Exception as error:
        if cancellations() > cancelled_before:
            raise asyncio.CancelledError from error
        raise
    finally:
        for task in tasks:
            if not task.cancelling():
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def cancellations() -> int:
    """How often the current task was asked to end. More than before: a handler of errors must not go on."""
    task = asyncio.current_task()
    return 0 if task is None else task.cancelling()
