"""A request inside the engine: its sequences, what each has produced, and what it has cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from midstream.engine.kv_tree import Lease
from midstream.errors import MidstreamError
from midstream.types import Completion, Delta, FinishReason, SamplingParams, Score, TokenLogprob, Usage

if TYPE_CHECKING:
    from midstream.adapters import Adapter
    from midstream.engine.constraints import Matcher

Outcome = Delta | Completion | Score | MidstreamError
Listener = Callable[[Outcome], None]


@dataclass(eq=False, slots=True)
class Job:
    """A request as the engine runs it: one or more sequences over one prompt.

    Positions before `activation` belong to the base model, the others to `adapter`.
    `continuations` is set for a `score` job, whose sequences hold given tokens and sample nothing.
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
    computed_base: int = 0
    computed_adapter: int = 0
    forwards: int = 0
    done: bool = False
    leased: bool = False

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
        """Count `count` positions from `position` on as computed by this job, as far as they are the prompt's."""
        end = min(position + count, len(self.prompt))
        base = max(0, min(end, self.owned_from) - position)
        self.computed_base += base
        self.computed_adapter += max(0, end - position - base)

    def usage(self) -> Usage:
        completion = sum(len(branch.output) for branch in self.branches)
        # An answer that its constraint forced whole needed no KV, so none was looked up.
        cached_base = self.owned_from - self.computed_base if self.leased else 0
        cached_adapter = len(self.prompt) - self.owned_from - self.computed_adapter if self.leased else 0
        return Usage(
            prompt_tokens=len(self.prompt),
            cached_base_tokens=cached_base,
            cached_adapter_tokens=cached_adapter,
            computed_tokens=self.computed_base + self.computed_adapter,
            completion_tokens=0 if self.continuations is not None else completion,
            forwards=self.forwards,
        )


@dataclass(eq=False, slots=True)
class Branch:
    """One branch of a job: `output` are its tokens after the prompt (sampled, forced, or given to be scored)."""

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
    decoded_to: int = 0
    emitted_chars: int = 0
    emitted_tokens: int = 0

    @property
    def scoring(self) -> bool:
        return self.job.continuations is not None

    @property
    def growth(self) -> int:
        """Slots beyond the prompt that the sequence can need: its last token's KV is never computed."""
        if self.job.continuations is not None:
            return max(0, len(self.job.continuations[self.index]) - 1)
        return self.job.params.max_tokens - 1
