"""A request inside the engine: its sequences, what each has produced, and what it has cost."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from midstream.engine.kv_tree import Lease
from midstream.errors import MidstreamError
from midstream.types import Completion, Delta, FinishReason, InvokedCall, SamplingParams, Score, TokenLogprob, Usage

if TYPE_CHECKING:
    from midstream.adapters import Adapter
    from midstream.engine.callee import Callee
    from midstream.engine.constraints import Matcher

Outcome = Delta | Completion | Score | MidstreamError
Listener = Callable[[Outcome], None]


@dataclass(eq=False, slots=True)
class Job:
    """A request as the engine runs it: one or more sequences over one prompt.

    Positions before `activation` belong to the base model, the others to `adapter`.
    `continuations` is set for a `score` job, whose sequences hold given tokens and sample nothing.
    `callees` may be invoked by the output. A job that such a call made has the branch that waits for it as its
    `caller`; it shares its request's id, adapters, deadline and end, and is told to nobody.
    """

    request_id: str
    prompt: tuple[int, ...]
    adapter: Adapter | None
    activation: int | None
    params: SamplingParams
    listener: Listener
    streaming: bool = False
    deadline: float | None = None
    continuations: Sequence[Sequence[int]] | None = None
    scope: str = ""
    branches: list[Branch] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)
    first_token_at: float | None = None
    callees: tuple[Callee, ...] = ()
    max_invocations: int = 0
    caller: Branch | None = None
    callee: Callee | None = None
    forwards: int = 0
    done: bool = False
    leased: bool = False
    # A byte for each prompt position, 1 where this job computed its KV.
    _computed: bytearray = field(init=False)

    def __post_init__(self) -> None:
        self._computed = bytearray(len(self.prompt))

    @property
    def root(self) -> Job:
        """The job that a caller knows of: this one, or the one whose output called it."""
        return self if self.caller is None else self.caller.job

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """What it may run on, held as long as it lives. A call's are held by its root."""
        if self.caller is not None:
            return ()
        own = () if self.adapter is None else (self.adapter,)
        return own + tuple(callee.adapter for callee in self.callees)

    @property
    def running_calls(self) -> list[Job]:
        """The calls that run on its behalf."""
        return [branch.call for branch in self.branches if branch.call is not None]

    @property
    def owner(self) -> str | None:
        return self.adapter.digest if self.adapter is not None else None

    @property
    def owned_from(self) -> int:
        """First position that the adapter owns; past the end for the base model."""
        return len(self.prompt) if self.activation is None else self.activation

    @property
    def finished(self) -> bool:
        return all(branch.finish is not None for branch in self.branches)

    def charge(self, position: int, count: int) -> None:
        """Note that this job computed `count` positions from `position` on; of interest are the prompt's.

        Each is counted once, though every branch reads the last one and an evicted one is read again.
        """
        end = min(position + count, len(self.prompt))
        if position < end:
            self._computed[position:end] = b"\1" * (end - position)

    def usage(self) -> Usage:
        completion = sum(len(branch.output) for branch in self.branches)
        base = self._computed.count(1, 0, self.owned_from)
        adapter = self._computed.count(1) - base
        # An answer that its constraint forced whole needed no KV, so none was looked up.
        cached_base = self.owned_from - base if self.leased else 0
        cached_adapter = len(self.prompt) - self.owned_from - adapter if self.leased else 0
        return Usage(
            prompt_tokens=len(self.prompt),
            cached_base_tokens=cached_base,
            cached_adapter_tokens=cached_adapter,
            computed_tokens=base + adapter,
            completion_tokens=0 if self.continuations is not None else completion,
            forwards=self.forwards,
        )


@dataclass(eq=False, slots=True)
class Branch:
    """One branch of a job: `output` are its tokens after the prompt (sampled, forced, inserted, or to be scored).

    `forced` are tokens that the constraint has accepted and that wait for their place in the output.
    After a call of an adapter, the base model's own text begins anew at token `own_from` and character
    `own_text_from`; the tokens before it are read like a prompt.
    """

    job: Job
    index: int
    lease: Lease | None = None
    output: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    finish: FinishReason | Literal["scored"] | None = None
    text: str = ""
    stop_at: int | None = None
    generator: Any = None
    matcher: Matcher | None = None
    forced: deque[int] = field(default_factory=deque)
    called: Callee | None = None
    call: Job | None = None
    calls: list[InvokedCall] = field(default_factory=list)
    own_from: int = 0
    own_text_from: int = 0
    decoded_to: int = 0
    emitted_chars: int = 0
    emitted_tokens: int = 0

    @property
    def scoring(self) -> bool:
        return self.job.continuations is not None

    @property
    def pausing(self) -> bool:
        """Whether an adapter has its turn."""
        return self.called is not None or self.call is not None

    @property
    def constraint_met(self) -> bool:
        """Whether a constraint has its whole text, so that nothing may follow."""
        return self.matcher is not None and self.matcher.finished and not self.forced

    @property
    def context(self) -> tuple[int, ...]:
        """What is read before the base model's own text goes on: the prompt, and the output up to the last call."""
        return self.job.prompt if not self.own_from else (*self.job.prompt, *self.output[: self.own_from])

    @property
    def growth(self) -> int:
        """Slots beyond the context that the sequence can need: its last token's KV is never computed."""
        if self.job.continuations is not None:
            return max(0, len(self.job.continuations[self.index]) - 1)
        return self.job.params.max_tokens - self.own_from - 1
