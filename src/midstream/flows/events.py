"""What a flow tells while it runs, and what it keeps of itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from midstream.errors import MidstreamError
from midstream.types import Completion, Request, Score, Usage

EventKind = Literal["step", "text", "call", "decision", "candidate", "observation", "end"]


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened: a step began, a piece of text came, a call ended, something was decided.

    `data` is JSON: text {text, index}; call {adapter, usage, and either error, or seconds and a completion's text};
    decision {outcome, reason, value}; candidate and observation: the flow's own. The last event of a flow is
    end {result}; a flow that raises instead of giving a result has none.
    """

    kind: EventKind
    step: str
    data: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "step": self.step, **self.data}


Listener = Callable[[Event], None]


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the backend: what was asked and what came of it. `continuations` are a score's."""

    step: str
    request: Request
    outcome: Completion | Score | MidstreamError
    continuations: tuple[tuple[int, ...], ...] = ()

    @property
    def usage(self) -> Usage:
        """With the adapters that the answer's own text invoked."""
        if isinstance(self.outcome, MidstreamError):
            return NO_USAGE
        if isinstance(self.outcome, Score):
            return self.outcome.usage
        invoked = (call.usage for choice in self.outcome.choices for call in choice.calls)
        return total([self.outcome.usage, *invoked])

    def as_dict(self) -> dict[str, Any]:
        """Without its prompt's tokens; a trace has those."""
        shown: dict[str, Any] = {"adapter": self.request.adapter, "usage": self.usage.as_dict()}
        if isinstance(self.outcome, MidstreamError):
            return {**shown, "error": error_dict(self.outcome)}
        if isinstance(self.outcome, Completion):
            shown["text"] = [choice.text for choice in self.outcome.choices]
        return {**shown, "seconds": self.outcome.seconds}


@dataclass(frozen=True, slots=True)
class Decision:
    """What a flow decided at a step, by which value, and why."""

    step: str
    outcome: str
    reason: str
    value: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return {"step": self.step, "outcome": self.outcome, "reason": self.reason, "value": self.value}


NO_USAGE = Usage(0, 0, 0, 0, 0, 0)


def total(each: Iterable[Usage]) -> Usage:
    """The sum of several usages. A forward that served two of them counts twice."""
    rows = [
        (
            u.prompt_tokens,
            u.cached_base_tokens,
            u.cached_adapter_tokens,
            u.computed_tokens,
            u.completion_tokens,
            u.forwards,
        )
        for u in each
    ]
    return Usage(*(sum(column) for column in zip(*rows, strict=True))) if rows else NO_USAGE


def error_dict(error: MidstreamError) -> dict[str, Any]:
    """An error as events and results have it."""
    return {"code": error.code, "message": str(error)}
