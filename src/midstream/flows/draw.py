"""Several answers to one prompt, each judged on its own KV: what best-of-n and the votes share.

Answers are drawn in waves. Those of a wave run at the same time, each as its own request with its own seed, and each
is scored as soon as it is whole, while others are still decoded. Whether to go on is decided when the whole wave has
ended, so what comes out depends on the run's seed and not on which answer was faster.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from midstream.backend import Backend
from midstream.errors import BudgetExceeded, InputError, MidstreamError
from midstream.flows.answer import transcript_of
from midstream.flows.draft import Draft, Drawn, DrawnParams
from midstream.flows.run import Run
from midstream.flows.scorers import INTRINSICS, Scorer, has_documents, scored, scorers_of
from midstream.intrinsics.call import find
from midstream.together import together
from midstream.transcript import Transcript
from midstream.types import Chat, SamplingParams

Stopped = Literal["all", "good_enough", "budget"]
_GROUNDED = "hallucination"


class DrawSettings(BaseModel):
    """How many answers are drawn, how each is sampled, and how many are drawn at the same time (None: all)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    n: int = Field(default=8, ge=1, le=128)
    params: DrawnParams = SamplingParams(max_tokens=256, temperature=0.8)
    at_once: int | None = Field(default=None, ge=1, le=128)

    @property
    def wave(self) -> int:
        """The most answers that are drawn at the same time."""
        return self.n if self.at_once is None else self.at_once


class ScoredSettings(DrawSettings):
    """How answers are scored: by the mean of what the scorers give, by these weights.

    Built in are `hallucination` (the probability that the answer is grounded in the documents; left out where the
    conversation has none), `certainty` and `requirement_check`, which needs a `requirement`. A weight of 0 has the
    score told and not counted.
    """

    weights: dict[str, float] = Field(default={"hallucination": 1.0, "certainty": 1.0}, min_length=1)
    requirement: str | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _check_weights(self) -> ScoredSettings:
        wrong = [name for name, weight in self.weights.items() if not 0 <= weight < math.inf]
        if wrong:
            raise ValueError(
                f"the weight of {wrong[0]} is {self.weights[wrong[0]]}; it must be finite and not negative"
            )
        if ("requirement_check" in self.weights) != (self.requirement is not None):
            raise ValueError("`requirement` and a weight for requirement_check go together: give both or neither")
        return self


@dataclass(frozen=True, kw_only=True)
class Candidate(Drawn):
    """An answer that was drawn. `scores` by scorer, `score` their weighted mean; None where it was not scored."""

    scores: Mapping[str, float]
    score: float | None

    def as_dict(self) -> dict[str, Any]:
        return {**super().as_dict(), "scores": dict(self.scores), "score": self.score}


class Drawing:
    """What has been drawn so far. `finished` is called with each answer that is whole, before it is scored."""

    def __init__(
        self,
        backend: Backend,
        run: Run,
        settings: DrawSettings,
        scorers: Mapping[str, Scorer],
        finished: Callable[[Draft], None] | None = None,
    ) -> None:
        self.conversation = Transcript()
        self.stopped: Stopped | None = None
        self._backend = backend
        self._run = run
        self._settings = settings
        self._own = scorers
        self._finished = finished
        self._scorers: dict[str, Scorer] = {}
        self._prompt: tuple[int, ...] = ()
        self._drafts: list[Draft] = []
        self._scores: dict[int, dict[str, float]] = {}

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """Every answer that was begun, in order."""
        return tuple(self._candidate(draft) for draft in self._drafts)

    @property
    def usable(self) -> tuple[Candidate, ...]:
        """Those that are whole, and scored where answers are."""
        return tuple(
            c for c in self.candidates if c.transcript is not None and (c.score is not None or not self._scored)
        )

    async def draw(self, conversation: Chat | Transcript, enough: Callable[[], bool] | None = None) -> None:
        """Draw wave by wave, until there are all, or `enough` says so, or the budget is spent.

        Raises what an answer failed of, once its wave has ended; BudgetExceeded where there was none for even one.
        """
        self.conversation = await transcript_of(self._backend, conversation)
        self._scorers = await self._prepared()
        self._prompt = await self.conversation.prompt(self._backend)
        while len(self._drafts) < self._settings.n:
            size = self._affordable()
            if size == 0:
                self._spent()
                return
            await self._wave(size)
            if enough is not None and len(self._drafts) < self._settings.n and enough():
                self.stopped = "good_enough"
                return
        self.stopped = "all"

    # ------------------------------------------------------------------ scorers

    @property
    def _scored(self) -> bool:
        return isinstance(self._settings, ScoredSettings)

    async def _prepared(self) -> dict[str, Scorer]:
        """The scorers that can be used here. An adapter that is missing is named before anything is drawn."""
        settings = self._settings
        if not isinstance(settings, ScoredSettings):
            return {}
        scorers = scorers_of(settings.weights, settings.requirement, self._own)
        if _GROUNDED in scorers and not has_documents(self.conversation):
            del scorers[_GROUNDED]
            self._run.decide("score", "without hallucination", "the conversation has no documents to be grounded in")
        if not sum(settings.weights[name] for name in scorers):
            raise InputError("no scorer with a weight is left to tell the answers apart: add one to `weights`")
        known = {info.name: info for info in await self._run.adapters_of(self._backend)}
        for name in scorers:
            if name in INTRINSICS:
                find(known, name)
        return scorers

    # ------------------------------------------------------------------ waves

    def _affordable(self) -> int:
        """How many answers the next wave takes: what the budget has room for, but one where anything is left."""
        size = min(self._settings.wave, self._settings.n - len(self._drafts))
        if self._run.max_tokens is None:
            return size
        left = self._run.max_tokens - self._run.tokens_spent
        return min(size, max(1, left // self._cost())) if left > 0 else 0

    def _cost(self) -> int:
        """Tokens that an answer is taken to cost: its `max_tokens`, or what one before cost with its judging."""
        # Without its prompt, which the answers share.
        before = (len(c.token_ids) + c.judging_tokens for c in self.candidates)
        return max(self._settings.params.max_tokens, max(before, default=0))

    def _spent(self) -> None:
        reason = f"{self._run.tokens_spent} of {self._run.max_tokens} tokens are spent"
        if not self.usable:
            raise BudgetExceeded(f"{reason}, and no answer is there: allow more")
        self.stopped = "budget"
        self._run.decide("stop", "budget", f"{reason} after {len(self._drafts)} answers")

    async def _wave(self, size: int) -> None:
        begun = len(self._drafts)
        wave = [Draft(self._run, index) for index in range(begun, begun + size)]
        self._drafts += wave
        with self._run.whole():
            await together([self._one(draft) for draft in wave])
        failed = next((draft.error for draft in wave if draft.error is not None), None)
        if failed is not None:
            raise failed

    async def _one(self, draft: Draft) -> None:
        """Draw an answer and score it. What fails is its own error, so that the others of its wave are not lost."""
        try:
            answered = await draft.generate(self._backend, self.conversation, self._prompt, self._settings.params)
            if self._finished is not None:
                self._finished(draft)
            await together([self._score(draft, answered, name) for name in self._scorers])
        except MidstreamError as error:
            draft.error = error
        self._run.tell("candidate", f"draw {draft.index}", self._candidate(draft).as_dict())

    async def _score(self, draft: Draft, answered: Transcript, name: str) -> None:
        value = await scored(self._scorers[name], name, draft.judge(self._backend, name), answered)
        self._scores.setdefault(draft.index, {})[name] = value

    def _candidate(self, draft: Draft) -> Candidate:
        found = self._scores.get(draft.index, {})
        scores = {name: found[name] for name in self._scorers if name in found}
        return Candidate(**draft.fields(), scores=scores, score=self._mean(scores))

    def _mean(self, scores: Mapping[str, float]) -> float | None:
        settings = self._settings
        if not isinstance(settings, ScoredSettings) or not scores or len(scores) < len(self._scorers):
            return None
        weights = settings.weights
        return sum(weights[name] * score for name, score in scores.items()) / sum(weights[name] for name in scores)
