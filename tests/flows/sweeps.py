"""A flow is stopped at every place there is, one after the other."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from midstream.backend import Backend
from midstream.errors import Cancelled, ForwardFailed
from midstream.flows.events import Event
from midstream.flows.run import FlowResult, Run
from midstream.types import Completion
from tests.flows.backends import Failing

R = TypeVar("R", bound=FlowResult)
Flow = Callable[[Backend, Run], Awaitable[R]]
Check = Callable[[], Awaitable[None]]


async def nothing() -> None:
    """What is checked between runs where there is nothing to check."""


async def fail_at_every_call(flow: Flow[R], make: Callable[[], Backend], idle: Check = nothing) -> tuple[R, list[R]]:
    """A run to the end, and one for each of its calls of the backend, which fails at that call."""
    whole = Failing(make(), None)
    result = await flow(whole, Run(seed=7))
    assert result.error is None
    stopped = []
    for at in range(len(whole.calls)):
        failing = Failing(make(), at)
        stopped.append(await flow(failing, Run(seed=7)))
        assert isinstance(failing.error, ForwardFailed)
        assert stopped[-1].error is failing.error, f"{whole.calls[at]}, call {at}"
        await idle()
    return result, stopped


async def cancel_at_every_event(flow: Flow[R], make: Callable[[], Backend], idle: Check = nothing) -> list[R]:
    """One run for each event, which is cancelled when that event is told."""
    stopped: list[R] = []
    while True:
        run, told = await _cancelled_at(flow, make(), len(stopped))
        await idle()
        if told <= len(stopped):
            return stopped
        stopped.append(run)


async def _cancelled_at(flow: Flow[R], backend: Backend, at: int) -> tuple[R, int]:
    """The result of a run that is cancelled at event number `at`, and how many events there were but for the last."""
    told: list[Event] = []

    def listen(event: Event) -> None:
        if event.kind != "end":
            told.append(event)
            if len(told) == at + 1:
                run.cancel()

    run = Run(seed=7, on_event=listen)
    result = await flow(backend, run)
    # What is cancelled at its very last step has come to its end.
    assert result.error is None or isinstance(result.error, Cancelled)
    assert len(told) <= at or isinstance(result.error, Cancelled) or told[at].kind in ("decision", "text")
    return result, len(told)


def ended(result: FlowResult, *, judged: bool) -> int:
    """How many of its calls, of the base model or of adapters that judge, came to their end."""
    done = [call for call in result.calls if isinstance(call.outcome, Completion)]
    return sum((call.request.adapter is not None) == judged for call in done)
