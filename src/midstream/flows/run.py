"""The run of a flow: its limits, its record, and how it ends when something stops it."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from midstream.backend import Backend
from midstream.errors import BudgetExceeded, Cancelled, DeadlineExceeded, MidstreamError
from midstream.flows.events import Call, Decision, Event, EventKind, Listener, error_dict, total
from midstream.types import AdapterInfo, Chat, Completion, Delta, Request, Score, Usage


@dataclass(frozen=True, kw_only=True)
class FlowResult:
    """What every flow gives back, whole or stopped. `error`: what stopped it, None when it came to its end.

    `usage` sums over `calls`; `seed` reproduces the run.
    """

    error: MidstreamError | None
    decisions: tuple[Decision, ...]
    calls: tuple[Call, ...]
    seconds: float
    seed: int

    @property
    def usage(self) -> Usage:
        return total(call.usage for call in self.calls)

    @property
    def tokens_spent(self) -> int:
        """Tokens that were computed: prompt positions and answers."""
        return spent(self.usage)

    def raise_for_error(self) -> None:
        """Raise what stopped the flow, if anything did."""
        if self.error is not None:
            raise self.error

    def as_dict(self) -> dict[str, Any]:
        """The form that programs read; subclasses add what is theirs."""
        return {
            "error": None if self.error is None else error_dict(self.error),
            "decisions": [decision.as_dict() for decision in self.decisions],
            "calls": [{"step": call.step, **call.as_dict()} for call in self.calls],
            "usage": self.usage.as_dict(),
            "tokens_spent": self.tokens_spent,
            "seconds": self.seconds,
            "seed": self.seed,
        }


class Run:
    """One run of a flow. Make one to set limits, to listen, or to cancel; it serves one flow.

    `deadline_s` is from the flow's start. `max_tokens` bounds the tokens that are computed (prompt positions and
    answers): no call begins once they are spent. Without a `seed` one is drawn, and told in the result.
    """

    def __init__(
        self,
        *,
        deadline_s: float | None = None,
        max_tokens: int | None = None,
        seed: int | None = None,
        on_event: Listener | None = None,
    ) -> None:
        self.deadline_s = deadline_s
        self.max_tokens = max_tokens
        self.seed = secrets.randbelow(2**31) if seed is None else seed
        self.calls: list[Call] = []
        self.decisions: list[Decision] = []
        self.error: MidstreamError | None = None
        self.seconds = 0.0
        self._on_event = on_event
        self._started: float | None = None
        self._task: asyncio.Task[None] | None = None
        self._cancelled = False
        self._adapters: tuple[AdapterInfo, ...] | None = None

    # ------------------------------------------------------------------ for callers

    def cancel(self) -> None:
        """Stop the flow; it gives back what it has, with the error Cancelled. To be called in the flow's event loop."""
        self._cancelled = True
        if self._task is not None:
            self._task.cancel()

    @property
    def tokens_spent(self) -> int:
        return spent(total(call.usage for call in self.calls))

    # ------------------------------------------------------------------ for flows

    async def execute(self, body: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run a flow's body until it ends or is stopped; `error` says by what. Nothing of it is left running."""
        if self._started is not None:
            raise RuntimeError("a Run serves one flow: make another")
        self._started = time.monotonic()
        self._task = asyncio.create_task(body())
        if self._cancelled:
            self._task.cancel()
        try:
            async with asyncio.timeout(self.deadline_s):
                await self._task
        except TimeoutError:
            self.error = DeadlineExceeded(f"the flow did not finish within {self.deadline_s} s")
        except MidstreamError as error:
            self.error = error
        except asyncio.CancelledError:
            if not self._cancelled:
                raise  # the caller's own task was cancelled
            self.error = Cancelled("the flow was cancelled")
        finally:
            self.seconds = time.monotonic() - self._started

    def backend(self, backend: Backend, step: str) -> Backend:
        """The backend as one step of this run sees it: counted, and held to the run's limits."""
        self.tell("step", step)
        return _Metered(self, backend, step)

    def decide(self, step: str, outcome: str, reason: str, value: float | None = None) -> None:
        """Note a decision."""
        decision = Decision(step, outcome, reason, value)
        self.decisions.append(decision)
        self.tell("decision", step, {"outcome": outcome, "reason": reason, "value": value})

    def tell(self, kind: EventKind, step: str, data: dict[str, Any] | None = None) -> None:
        """Tell the listener, if there is one."""
        if self._on_event is not None:
            self._on_event(Event(kind, step, data or {}))

    def finish(self) -> dict[str, Any]:
        """The fields of the flow's result that are the run's."""
        return {
            "error": self.error,
            "decisions": tuple(self.decisions),
            "calls": tuple(self.calls),
            "seconds": self.seconds,
            "seed": self.seed,
        }

    # ------------------------------------------------------------------ for the metered backend

    async def adapters_of(self, backend: Backend) -> tuple[AdapterInfo, ...]:
        """The backend's adapters as they were when the run first asked: a run uses one set of them."""
        if self._adapters is None:
            self._adapters = await backend.adapters()
        return self._adapters

    def limited(self, request: Request) -> Request:
        """A request with what is left of the run's time. Raises BudgetExceeded when its tokens are spent."""
        if self.max_tokens is not None and self.tokens_spent >= self.max_tokens:
            raise BudgetExceeded(f"the flow has spent {self.tokens_spent} of its {self.max_tokens} tokens")
        if self.deadline_s is None or self._started is None:
            return request
        left = max(0.001, self._started + self.deadline_s - time.monotonic())
        asked = request.deadline_s
        return request.model_copy(update={"deadline_s": left if asked is None else min(left, asked)})

    def record(self, call: Call) -> None:
        """Note a call that has ended."""
        self.calls.append(call)
        self.tell("call", call.step, call.as_dict())


class _Metered:
    """A backend whose calls are noted in a run."""

    def __init__(self, run: Run, backend: Backend, step: str) -> None:
        self._run = run
        self._backend = backend
        self._step = step

    async def complete(self, request: Request) -> Completion:
        limited = self._run.limited(request)
        try:
            completion = await self._backend.complete(limited)
        except MidstreamError as error:
            self._run.record(Call(self._step, request, error))
            raise
        self._run.record(Call(self._step, request, completion))
        return completion

    async def stream(self, request: Request) -> AsyncGenerator[Delta, None]:
        limited = self._run.limited(request)
        try:
            async with aclosing(_generator(self._backend, limited)) as deltas:
                async for delta in deltas:
                    if delta.text:
                        self._run.tell("text", self._step, {"text": delta.text, "index": delta.index})
                    if delta.completion is not None:
                        self._run.record(Call(self._step, request, delta.completion))
                    yield delta
        except MidstreamError as error:
            self._run.record(Call(self._step, request, error))
            raise

    async def score(self, request: Request, continuations: Sequence[Sequence[int]]) -> Score:
        given = tuple(tuple(each) for each in continuations)
        limited = self._run.limited(request)
        try:
            score = await self._backend.score(limited, continuations)
        except MidstreamError as error:
            self._run.record(Call(self._step, request, error, given))
            raise
        self._run.record(Call(self._step, request, score, given))
        return score

    async def tokenize(self, prompt: str | Chat, *, header: bool = True) -> tuple[int, ...]:
        return await self._backend.tokenize(prompt, header=header)

    async def adapters(self) -> tuple[AdapterInfo, ...]:
        return await self._run.adapters_of(self._backend)


async def _generator(backend: Backend, request: Request) -> AsyncGenerator[Delta, None]:
    """A backend's stream as a generator, which can be closed."""
    stream = backend.stream(request)
    try:
        async for delta in stream:
            yield delta
    finally:
        close = getattr(stream, "aclose", None)
        if close is not None:
            await close()


def spent(usage: Usage) -> int:
    """Tokens that were computed for a usage: prompt positions and answers."""
    return usage.computed_tokens + usage.completion_tokens
