"""The run of a flow: its limits, its record, and how it ends when something stops it."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from midstream.backend import Backend
from midstream.errors import BudgetExceeded, Cancelled, DeadlineExceeded, MidstreamError
from midstream.flows.events import Call, Decision, Event, EventKind, Listener, error_dict, total
from midstream.together import cancellations
from midstream.types import AdapterInfo, Chat, Completion, Delta, Request, Score, Usage

R = TypeVar("R", bound="FlowResult")


@dataclass(frozen=True, kw_only=True)
class FlowResult:
    """What every flow gives back, whole or stopped. `error`: what stopped it, None when it came to its end.

    `calls` are in the order in which they ended, and `usage` is their sum: what a call that failed or was stopped had
    computed is not known. `seed` reproduces the run.
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
    answers): no call begins once they are spent. What a flow has begun as a whole is brought to its end, so it can
    spend more by that. Reused tokens are not charged: with a budget the result also depends on what the KV cache held
    already. Without a `seed` one is drawn, and told in the result.

    `on_event` is called in the flow's event loop, which waits for it. What it raises stops the flow: a MidstreamError
    becomes the flow's error, anything else is raised to the flow's caller. Either way nothing is left running. The
    event `end` is told when there is a result already: what is raised there is the caller's.
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
        self._adapters: dict[int, tuple[AdapterInfo, ...]] = {}
        self._asking = asyncio.Lock()
        self._unbounded = 0

    # ------------------------------------------------------------------ for callers

    def cancel(self) -> None:
        """Stop the flow; it gives back what it has, with the error Cancelled. To be called in the flow's event loop."""
        if self._cancelled:
            return  # a second cancellation would cut short how the first one ends
        self._cancelled = True
        if self._task is not None:
            self._task.cancel()

    @property
    def tokens_spent(self) -> int:
        return spent(total(call.usage for call in self.calls))

    # ------------------------------------------------------------------ for flows

    async def execute(self, body: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run a flow's body until it ends or is stopped; `error` says by what. Nothing of it is left running.

        Raises CancelledError when the caller's own task is cancelled, what the body raises that is no MidstreamError,
        and RuntimeError when this run has served a flow already.
        """
        if self._started is not None:
            raise RuntimeError("a Run serves one flow: make another")
        self._started = time.monotonic()
        cancelled_before = cancellations()
        self._task = asyncio.create_task(body())
        if self._cancelled:
            self._task.cancel()
        deadline = asyncio.timeout(self.deadline_s)
        try:
            async with deadline:
                await self._task
        except TimeoutError:
            if not deadline.expired():
                raise  # the body's own
            self.error = DeadlineExceeded(f"the flow did not finish within {self.deadline_s} s")
        except MidstreamError as error:
            self.error = error
        except asyncio.CancelledError:
            self.error = Cancelled("the flow was cancelled")
        finally:
            self.seconds = time.monotonic() - self._started
        if cancellations() > cancelled_before:
            raise asyncio.CancelledError  # the caller's own task was cancelled, whatever the body made of it

    def backend(self, backend: Backend, step: str, *, quiet: bool = False) -> Backend:
        """The backend as one step of this run sees it: counted, and held to the run's limits.

        `quiet`: what it streams is not told as text; the flow does that itself, or withholds it.
        """
        self.tell("step", step)
        return _Metered(self, backend, step, quiet)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """What begins in here is brought to its end: its calls are not held to the token budget."""
        self._unbounded += 1
        try:
            yield
        finally:
            self._unbounded -= 1

    def decide(self, step: str, outcome: str, reason: str, value: float | None = None) -> None:
        """Note a decision."""
        decision = Decision(step, outcome, reason, value)
        self.decisions.append(decision)
        self.tell("decision", step, {"outcome": outcome, "reason": reason, "value": value})

    def tell(self, kind: EventKind, step: str, data: dict[str, Any] | None = None) -> None:
        """Tell the listener, if there is one."""
        if self._on_event is not None:
            self._on_event(Event(kind, step, data or {}))

    def end(self, result: R) -> R:
        """Tell that the flow has ended, and give its result back: the last thing a flow does."""
        if self._on_event is not None:
            self.tell("end", "end", {"result": result.as_dict()})
        return result

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
        async with self._asking:
            if id(backend) not in self._adapters:
                self._adapters[id(backend)] = await backend.adapters()
            return self._adapters[id(backend)]

    def limited(self, request: Request) -> Request:
        """A request with what is left of the run's time. Raises BudgetExceeded when its tokens are spent."""
        if self.max_tokens is not None and not self._unbounded and self.tokens_spent >= self.max_tokens:
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

    def __init__(self, run: Run, backend: Backend, step: str, quiet: bool) -> None:
        self._run = run
        self._backend = backend
        self._step = step
        self._quiet = quiet

    async def complete(self, request: Request) -> Completion:
        limited = self._run.limited(request)
        with self._noting(request) as note:
            completion = await self._backend.complete(limited)
            note(completion)
        return completion

    async def stream(self, request: Request) -> AsyncGenerator[Delta, None]:
        limited = self._run.limited(request)
        with self._noting(request) as note:
            async with aclosing(opened(self._backend, limited)) as deltas:
                async for delta in deltas:
                    if delta.text and not self._quiet:
                        self._run.tell("text", self._step, {"text": delta.text, "index": delta.index})
                    if delta.completion is not None:
                        note(delta.completion)
                    yield delta

    async def score(self, request: Request, continuations: Sequence[Sequence[int]]) -> Score:
        limited = self._run.limited(request)
        with self._noting(request, tuple(tuple(each) for each in continuations)) as note:
            score = await self._backend.score(limited, continuations)
            note(score)
        return score

    async def tokenize(self, prompt: str | Chat, *, header: bool = True) -> tuple[int, ...]:
        return await self._backend.tokenize(prompt, header=header)

    async def adapters(self) -> tuple[AdapterInfo, ...]:
        return await self._run.adapters_of(self._backend)

    @contextmanager
    def _noting(
        self, request: Request, continuations: tuple[tuple[int, ...], ...] = ()
    ) -> Iterator[Callable[[Completion | Score], None]]:
        """Note a call once: by its outcome, or by what ends it before."""
        noted = False

        def note(outcome: Completion | Score | MidstreamError) -> None:
            nonlocal noted
            if not noted:
                noted = True
                self._run.record(Call(self._step, request, outcome, continuations))

        try:
            yield note
        except MidstreamError as error:
            note(error)
            raise
        except (asyncio.CancelledError, GeneratorExit):
            note(Cancelled("the call was left before its end"))
            raise


async def opened(backend: Backend, request: Request) -> AsyncGenerator[Delta, None]:
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
