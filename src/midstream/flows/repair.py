"""Instruct, validate, repair: an answer is checked against requirements, and asked for again where it fails."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from midstream.backend import Backend
from midstream.errors import InputError, MidstreamError
from midstream.flows.answer import transcript_of
from midstream.flows.chosen import Chosen
from midstream.flows.draft import Draft, Drawn, DrawnParams
from midstream.flows.requirements import Requirement, Verdict, judgeable, verdict
from midstream.flows.run import Run
from midstream.together import together
from midstream.transcript import Transcript
from midstream.types import Chat, Message, SamplingParams

_UNMET = "{unmet}"
_INSTRUCTION = (
    "Your answer does not meet these requirements:\n{unmet}\nWrite the whole answer again so that it meets them. "
    "Keep what is right, and do not mention these requirements."
)


class RepairSettings(BaseModel):
    """`repair`: "append" tells the model, in a turn of its own, what its answer fails of, so that all that was computed
    is reused; "resample" draws another answer to the same prompt. `threshold`: a requirement without a check is met
    from this probability on. `instruction` is the turn's text, with `{unmet}` in the place of the failed ones.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    attempts: int = Field(default=3, ge=1, le=64)
    repair: Literal["append", "resample"] = "append"
    threshold: float = Field(default=0.5, ge=0, le=1)
    params: DrawnParams = SamplingParams(max_tokens=256)
    instruction: str = _INSTRUCTION

    @model_validator(mode="after")
    def _check(self) -> RepairSettings:
        if _UNMET not in self.instruction:
            raise ValueError(f"the instruction must say {_UNMET} where the failed requirements are to stand")
        if self.repair == "resample" and self.attempts > 1 and not self.params.temperature:
            raise ValueError("at temperature 0 another sample is the same answer: give params a temperature")
        return self


@dataclass(frozen=True, kw_only=True)
class Attempt(Drawn):
    """An answer with a verdict on each requirement; fewer where the flow was stopped. `met`: it meets them all."""

    verdicts: tuple[Verdict, ...]
    met: bool

    @property
    def num_met(self) -> int:
        return sum(verdict.met for verdict in self.verdicts)

    @property
    def probability(self) -> float:
        """The mean probability that a requirement is met."""
        return sum(verdict.probability for verdict in self.verdicts) / max(1, len(self.verdicts))

    def as_dict(self) -> dict[str, Any]:
        verdicts = [verdict.as_dict() for verdict in self.verdicts]
        return {**super().as_dict(), "verdicts": verdicts, "met": self.met}


@dataclass(frozen=True, kw_only=True)
class Repair(Chosen[Attempt]):
    """Every attempt, and the best of those that were judged: most requirements met, then the highest mean probability,
    then the first. `met`: it meets them all. Where repairs are appended, its transcript has the attempts before it.
    """

    attempts: tuple[Attempt, ...]

    @property
    def met(self) -> bool:
        return self.best is not None and self.best.met

    def as_dict(self) -> dict[str, Any]:
        return {
            "met": self.met,
            "attempts": [attempt.as_dict() for attempt in self.attempts],
            **super().as_dict(),
        }


async def repair(
    backend: Backend,
    conversation: Chat | Transcript,
    requirements: Sequence[Requirement],
    settings: RepairSettings | None = None,
    *,
    run: Run | None = None,
) -> Repair:
    """Answer a conversation, judge the answer by each requirement, and have it repaired until it meets all of them.

    The model is told of a requirement only when its answer has failed it. What stops the flow is the result's `error`:
    InputError where a check fails, BudgetExceeded where the run's tokens are spent; every attempt up to then is there.
    """
    flow = _Repair(backend, tuple(requirements), settings or RepairSettings(), run or Run())
    await flow.run.execute(lambda: flow.play(conversation))
    return flow.run.end(flow.result())


class _Repair:
    def __init__(
        self, backend: Backend, requirements: tuple[Requirement, ...], settings: RepairSettings, run: Run
    ) -> None:
        self.backend = backend
        self.requirements = requirements
        self.settings = settings
        self.run = run
        self.conversation = Transcript()
        self.drafts: list[Draft] = []
        self.verdicts: list[dict[int, Verdict]] = []

    async def play(self, conversation: Chat | Transcript) -> None:
        if not self.requirements:
            raise InputError("repair needs at least one requirement")
        self.conversation = asked = await transcript_of(self.backend, conversation)
        await judgeable(self.backend, self.run, self.requirements)
        for index in range(self.settings.attempts):
            answered = await self._attempt(asked)
            unmet = [text for text, verdict in self._judged(index) if not verdict.met]
            if not unmet:
                self.run.decide(f"judge {index}", "met", "the answer meets all requirements")
                return
            self.run.decide(f"judge {index}", "unmet", f"the answer does not meet: {'; '.join(unmet)}")
            if self.settings.repair == "append" and index + 1 < self.settings.attempts:
                asked = await answered.add(self.backend, self._complaint(unmet))

    def result(self) -> Repair:
        attempts = tuple(self._frozen(draft) for draft in self.drafts)
        judged = [attempt for attempt in attempts if len(attempt.verdicts) == len(self.requirements)]
        # max takes the first of several that are alike.
        best = max(judged, key=lambda attempt: (attempt.num_met, attempt.probability), default=None)
        return Repair(conversation=self.conversation, attempts=attempts, best=best, **self.run.finish())

    async def _attempt(self, asked: Transcript) -> Transcript:
        draft = Draft(self.run, len(self.drafts))
        self.drafts.append(draft)
        self.verdicts.append({})
        try:
            prompt = await asked.prompt(self.backend)
            answered = await draft.generate(self.backend, asked, prompt, self.settings.params)
            await together([self._judge(draft, answered, number) for number in range(len(self.requirements))])
        except MidstreamError as error:
            draft.error = error
            raise
        self.run.tell("candidate", f"draw {draft.index}", self._frozen(draft).as_dict())
        return answered

    async def _judge(self, draft: Draft, answered: Transcript, number: int) -> None:
        backend = draft.judge(self.backend, f"requirement {number}")
        found = await verdict(backend, answered, self.requirements[number], self.settings.threshold)
        self.verdicts[draft.index][number] = found

    def _judged(self, index: int) -> list[tuple[str, Verdict]]:
        """The verdicts of an attempt with their requirements, in the requirements' order."""
        found = self.verdicts[index]
        return [(self.requirements[number].text, found[number]) for number in sorted(found)]

    def _complaint(self, unmet: list[str]) -> Message:
        failed = "\n".join(f"- {text}" for text in unmet)
        return Message(role="user", content=self.settings.instruction.replace(_UNMET, failed))

    def _frozen(self, draft: Draft) -> Attempt:
        verdicts = tuple(verdict for _, verdict in self._judged(draft.index))
        met = len(verdicts) == len(self.requirements) and all(verdict.met for verdict in verdicts)
        return Attempt(**draft.fields(), verdicts=verdicts, met=met)
