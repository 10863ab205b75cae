"""One step of an agent, as its result has it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from midstream.types import InvokedCall

Action = Literal["tool", "answer", "unusable"]


@dataclass(frozen=True, slots=True)
class AgentStep:
    """What an agent thought, did and saw in one step; a step that was stopped has what there was of it.

    `text` is the action as the model wrote it. "unusable": it is no whole action, because it ran out of tokens.
    `calls` are the adapters that the thought invoked, `steps` those of an agent that was called as a tool. `tokens`
    and `seconds` are all that the step took.
    """

    number: int
    thought: str = ""
    text: str = ""
    action: Action | None = None
    tool: str | None = None
    arguments: dict[str, Any] | None = None
    observation: str | None = None
    failed: bool = False
    calls: tuple[InvokedCall, ...] = ()
    steps: tuple[AgentStep, ...] = ()
    tokens: int = 0
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return {
            "number": self.number,
            "thought": self.thought,
            "text": self.text,
            "action": self.action,
            "tool": self.tool,
            "arguments": self.arguments,
            "observation": self.observation,
            "failed": self.failed,
            "calls": [invoked_dict(call) for call in self.calls],
            "steps": [step.as_dict() for step in self.steps],
            "tokens": self.tokens,
            "seconds": self.seconds,
        }


def invoked_dict(call: InvokedCall) -> dict[str, Any]:
    """A call of an adapter by the model's own output, as events and results have it."""
    return {
        "adapter": call.adapter,
        "text": call.text,
        "probabilities": call.probabilities,
        "finish_reason": call.finish_reason,
        "usage": call.usage.as_dict(),
        "seconds": call.seconds,
    }
