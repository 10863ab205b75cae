"""Votes: several answers are drawn, and the one that most of them agree on is taken.

Self-consistency, as in Wang et al., "Self-Consistency Improves Chain of Thought Reasoning in Language Models" (2022).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import Field, field_validator

from midstream.backend import Backend
from midstream.errors import InputError, OutputError
from midstream.flows.chosen import Chosen
from midstream.flows.draft import Draft
from midstream.flows.draw import Candidate, Drawing, DrawSettings, ScoredSettings, Stopped
from midstream.flows.keys import Key, compiled, extracting, key_of, normalised
from midstream.flows.run import Run
from midstream.flows.scorers import Scorer
from midstream.transcript import Transcript
from midstream.types import Chat


class MajoritySettings(DrawSettings):
    """`extract`: a regular expression of RE2's; answers are compared by its last match's first group, else whole."""

    extract: str | None = Field(default=None, min_length=1, max_length=1000)

    @field_validator("extract")
    @classmethod
    def _check_extract(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            compiled(pattern)
        return pattern


class WeightedMajoritySettings(MajoritySettings, ScoredSettings):
    """A vote in which each answer counts as much as its score."""


@dataclass(frozen=True, slots=True)
class Group:
    """Answers with the same key. `candidates` are their indices; `weight` the sum of their scores, or their number."""

    key: str
    candidates: tuple[int, ...]
    weight: float

    @property
    def votes(self) -> int:
        return len(self.candidates)

    def as_dict(self) -> dict[str, Any]:
        return {"key": self.key, "candidates": list(self.candidates), "votes": self.votes, "weight": self.weight}


@dataclass(frozen=True, kw_only=True)
class Majority(Chosen[Candidate]):
    """Every answer that was begun, and the groups, heaviest first; on a tie, the one with the earliest answer.

    `best` is the best-scored answer of the winning group, without scores its first. `keyless` answers have no vote.
    `stopped`: why no more were drawn; None where an error stopped the flow.
    """

    candidates: tuple[Candidate, ...]
    groups: tuple[Group, ...]
    keyless: tuple[int, ...]
    stopped: Stopped | None

    @property
    def winner(self) -> Group | None:
        return self.groups[0] if self.groups else None

    def as_dict(self) -> dict[str, Any]:
        return {
            "groups": [group.as_dict() for group in self.groups],
            "keyless": list(self.keyless),
            "stopped": self.stopped,
            "candidates": [candidate.as_dict() for candidate in self.candidates],
            **super().as_dict(),
        }


async def majority(
    backend: Backend,
    conversation: Chat | Transcript,
    settings: MajoritySettings | None = None,
    *,
    key: Key | None = None,
    run: Run | None = None,
) -> Majority:
    """Draw n answers to a conversation and take the one that most agree on.

    Answers agree when their keys are the same: their text without case, articles and punctuation, or what `extract` or
    the caller's own `key` makes of it. What stops the flow is the result's `error`, an OutputError where no answer has
    a key; what was drawn up to then is there. Limits are those of `best_of_n`.
    """
    return await _voted(backend, conversation, settings or MajoritySettings(), {}, key, run)


async def weighted_majority(
    backend: Backend,
    conversation: Chat | Transcript,
    settings: WeightedMajoritySettings | None = None,
    *,
    scorers: Mapping[str, Scorer] | None = None,
    key: Key | None = None,
    run: Run | None = None,
) -> Majority:
    """Like `majority`, but each answer counts as much as its score, which is that of `best_of_n`."""
    return await _voted(backend, conversation, settings or WeightedMajoritySettings(), scorers or {}, key, run)


async def _voted(
    backend: Backend,
    conversation: Chat | Transcript,
    settings: MajoritySettings,
    scorers: Mapping[str, Scorer],
    key: Key | None,
    run: Run | None,
) -> Majority:
    vote = _Vote(backend, settings, scorers, key, run or Run())
    await vote.run.execute(lambda: vote.play(conversation))
    return vote.run.end(vote.result())


class _Vote:
    def __init__(
        self, backend: Backend, settings: MajoritySettings, scorers: Mapping[str, Scorer], key: Key | None, run: Run
    ) -> None:
        self.run = run
        self.settings = settings
        self.key = key
        self.key_of_text = key or (normalised if settings.extract is None else extracting(settings.extract))
        self.keys: dict[int, str | None] = {}
        self.drawing = Drawing(backend, run, settings, scorers, self._finished)

    async def play(self, conversation: Chat | Transcript) -> None:
        if self.key is not None and self.settings.extract is not None:
            raise InputError("answers are compared by `extract` or by a function: give one of them")
        await self.drawing.draw(conversation)
        usable = self.drawing.usable
        groups = self._groups(usable)
        if not groups:
            raise OutputError(f"none of the {len(usable)} answers has a key to be compared by")
        reason = f"{groups[0].votes} of {len(usable)} answers agree on {groups[0].key!r}"
        self.run.decide("vote", f"group of answer {groups[0].candidates[0]}", reason, groups[0].weight)

    def result(self) -> Majority:
        usable = self.drawing.usable
        groups = self._groups(usable)
        winners = [candidate for candidate in usable if groups and candidate.index in groups[0].candidates]
        return Majority(
            conversation=self.drawing.conversation,
            candidates=self.drawing.candidates,
            # max takes the first of several that are alike.
            best=max(winners, key=lambda candidate: candidate.score or 0.0, default=None),
            groups=groups,
            keyless=tuple(c.index for c in usable if self.keys.get(c.index) is None),
            stopped=self.drawing.stopped,
            **self.run.finish(),
        )

    def _finished(self, draft: Draft) -> None:
        self.keys[draft.index] = key_of(self.key_of_text, draft.text)

    def _groups(self, usable: tuple[Candidate, ...]) -> tuple[Group, ...]:
        agreeing: dict[str, list[Candidate]] = {}
        for candidate in usable:
            key = self.keys.get(candidate.index)
            if key is not None:
                agreeing.setdefault(key, []).append(candidate)
        groups = [
            Group(key, tuple(c.index for c in each), sum(1.0 if c.score is None else c.score for c in each))
            for key, each in agreeing.items()
        ]
        # sorted() keeps the order of those that are alike, which is that of their first answers.
        return tuple(sorted(groups, key=lambda group: -group.weight))
