"""The result of a flow that takes one of several answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from midstream.flows.draft import Drawn
from midstream.flows.run import FlowResult
from midstream.transcript import Transcript

D = TypeVar("D", bound=Drawn)


@dataclass(frozen=True, kw_only=True)
class Chosen(FlowResult, Generic[D]):
    """`conversation` is what was answered, `best` the answer that was taken, None where there was none to take."""

    conversation: Transcript
    best: D | None

    @property
    def text(self) -> str:
        """The best answer's text; empty where there is none."""
        return "" if self.best is None else self.best.text

    @property
    def transcript(self) -> Transcript:
        """The conversation as it was computed with the best answer, or as it was where there is none."""
        found = None if self.best is None else self.best.transcript
        return self.conversation if found is None else found

    def as_dict(self) -> dict[str, Any]:
        best = None if self.best is None else self.best.index
        return {"text": self.text, "best": best, **super().as_dict()}
