"""A flow that runs for a streaming client."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, Self

from midstream.errors import MidstreamError
from midstream.flows.events import Event, Listener
from midstream.flows.run import FlowResult
from midstream.server import replies
from midstream.server.stream import DONE, event


class Playing:
    """The events of a flow, as server-sent ones: those that it tells, then its end with the result.

    The flow runs from the beginning, whether or not anybody reads; `aclose` ends it and waits for that.
    """

    def __init__(self, flow: Callable[[Listener], Coroutine[Any, Any, FlowResult]]) -> None:
        # None is told when the flow has ended.
        self._told: asyncio.Queue[Event | None] = asyncio.Queue()
        self._held: deque[Event | None] = deque()
        self._over = False
        self._task = asyncio.create_task(flow(self._told.put_nowait))
        self._task.add_done_callback(lambda _: self._told.put_nowait(None))

    def result(self) -> FlowResult:
        """The result of a flow that has ended. Raises what it raised."""
        return self._task.result()

    async def begun(self) -> bool:
        """Wait until something has come of the flow; False where it ended before that.

        Until then a failure can still be told by the response's own status.
        """
        while True:
            told = await self._told.get()
            self._held.append(told)
            if told is None:
                return False
            if _something(told):
                return True

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        while not self._over:
            told = self._held.popleft() if self._held else await self._told.get()
            if told is None:
                self._over = True
                return self._end() + DONE
            if told.kind != "end":
                return event(told.as_dict())
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """End the flow, if it still runs."""
        self._over = True
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def _end(self) -> bytes:
        try:
            result = self.result()
        except MidstreamError as error:
            return event({"error": replies.error_object(error)})
        return event(Event("end", "end", {"result": result.as_dict()}).as_dict())


def _something(told: Event) -> bool:
    """Whether an event tells more than that something was begun, and failed."""
    if told.kind == "call":
        return "error" not in told.data
    return told.kind not in ("step", "end")
