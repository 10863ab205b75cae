"""Sending a request again whose answer was lost on the way. Generation keeps no state, so that this is safe."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

from midstream.errors import MidstreamError

T = TypeVar("T")
_FIRST_WAIT_S = 0.25


class Lost(Exception):
    """A try ended without a whole answer, for no fault of the request: its replica died, stopped or was never reached.

    `error` is what the caller is told when no try is left.
    """

    def __init__(self, error: MidstreamError) -> None:
        super().__init__(str(error))
        self.error = error


def waits(repeats: int) -> Iterator[float]:
    """Seconds to wait before each repeat: 0.25, then twice as long each time."""
    return (_FIRST_WAIT_S * 2**number for number in range(repeats))


async def repeated(attempt: Callable[[], Awaitable[T]], repeats: int) -> T:
    """The result of the first try that is not lost. Raises the last one's error."""
    for wait in waits(repeats):
        try:
            return await attempt()
        except Lost:
            await asyncio.sleep(wait)
    try:
        return await attempt()
    except Lost as lost:
        raise lost.error from lost.__cause__
