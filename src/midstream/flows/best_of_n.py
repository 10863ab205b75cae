"""Best of n: several answers are drawn, and the one that is judged best is taken.

A verifier picks from samples of the model, as in Cobbe et al., "Training Verifiers to Solve Math Word Problems" (2021),
and Stiennon et al., "Learning to summarize from human feedback" (2020). Here the verifiers are intrinsics, which read a
candidate's KV where it lies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from midstream.backend import Backend
from midstream.flows.chosen import Chosen
from midstream.flows.draw import Candidate, Drawing, ScoredSettings, Stopped
from midstream.flows.run import Run
from midstream.flows.scorers import Scorer
from midstream.transcript import Transcript
from midstream.types import Chat

_WAVE = 4  # answers at a time, where an early one may be good enough


class BestOfNSettings(ScoredSettings):
    """`good_enough`: no further wave is drawn once an answer has this score; waves are then of 4, if not told."""

    good_enough: float | None = Field(default=None, allow_inf_nan=False)

    @property
    def wave(self) -> int:
        return _WAVE if self.at_once is None and self.good_enough is not None else super().wave


@dataclass(frozen=True, slots=True)
class Point:
    """What the first `n` answers came to: the best score among them, and the tokens that they took."""

    n: int
    score: float | None
    tokens: int


@dataclass(frozen=True, kw_only=True)
class BestOfN(Chosen[Candidate]):
    """Every answer that was begun, and the best of those that were scored: on a tie the first.

    `stopped`: why no more were drawn; None where an error stopped the flow.
    """

    candidates: tuple[Candidate, ...]
    stopped: Stopped | None

    def curve(self) -> tuple[Point, ...]:
        """Quality against compute: a point for the first answer, the first two, and so on."""
        points: list[Point] = []
        best: float | None = None
        tokens = 0
        for count, candidate in enumerate(self.candidates, 1):
            tokens += candidate.tokens_spent
            if candidate.score is not None and (best is None or candidate.score > best):
                best = candidate.score
            points.append(Point(count, best, tokens))
        return tuple(points)

    def as_dict(self) -> dict[str, Any]:
        return {
            "stopped": self.stopped,
            "candidates": [candidate.as_dict() for candidate in self.candidates],
            **super().as_dict(),
        }


async def best_of_n(
    backend: Backend,
    conversation: Chat | Transcript,
    settings: BestOfNSettings | None = None,
    *,
    scorers: Mapping[str, Scorer] | None = None,
    run: Run | None = None,
) -> BestOfN:
    """Draw n answers to a conversation, score each, and give back all with the best.

    `scorers` are the caller's own, each with its weight in the settings. What stops the flow is the result's `error`.
    An answer that fails, or whose scorer does, ends the flow when its wave has ended: the others of the wave are there.
    The run's `max_tokens` is looked at between waves; once they are spent the flow ends well with what there is.
    """
    flow = _BestOfN(backend, settings or BestOfNSettings(), scorers or {}, run or Run())
    await flow.run.execute(lambda: flow.play(conversation))
    return flow.run.end(flow.result())


class _BestOfN:
    def __init__(self, backend: Backend, settings: BestOfNSettings, scorers: Mapping[str, Scorer], run: Run) -> None:
        self.run = run
        self.good_enough = settings.good_enough
        self.drawing = Drawing(backend, run, settings, scorers)

    async def play(self, conversation: Chat | Transcript) -> None:
        await self.drawing.draw(conversation, self._enough)
        best = self._best()
        if best is not None:
            self.run.decide("best", f"answer {best.index}", "it has the highest score", best.score)

    def result(self) -> BestOfN:
        return BestOfN(
            conversation=self.drawing.conversation,
            candidates=self.drawing.candidates,
            best=self._best(),
            stopped=self.drawing.stopped,
            **self.run.finish(),
        )

    def _best(self) -> Candidate | None:
        # max takes the first of several that are alike.
        return max(self.drawing.usable, key=lambda candidate: candidate.score or 0.0, default=None)

    def _enough(self) -> bool:
        best = self._best()
        if self.good_enough is None or best is None or best.score is None or best.score < self.good_enough:
            return False
        reason = f"answer {best.index} has {best.score:.2f}, good enough from {self.good_enough:.2f} on"
        self.run.decide("stop", "good_enough", reason, best.score)
        return True
