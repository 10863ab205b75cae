"""A guarded answer: the question is checked before it, and the answer against requirements after it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from midstream.backend import Backend
from midstream.errors import MidstreamError
from midstream.flows.answer import told, transcript_of
from midstream.flows.draft import Draft, Drawn, DrawnParams
from midstream.flows.requirements import Requirement, Verdict, judgeable, verdict
from midstream.flows.run import FlowResult, Run
from midstream.intrinsics import jailbreak
from midstream.intrinsics.call import find
from midstream.together import together
from midstream.transcript import Transcript
from midstream.types import Chat, SamplingParams

Outcome = Literal["answered", "flagged", "withheld", "refused", "stopped"]


class GuardSettings(BaseModel):
    """What is checked, and its thresholds: probabilities between 0 and 1.

    `guard`: refused from this probability of a jailbreak on; None asks for none. A requirement is met from `met` on.
    `unmet`: an answer that fails one is withheld and `fallback` told in its place, or told and flagged. Only what can
    no longer be withheld is told as it comes: with requirements and "fallback", an answer's text comes in one piece.
    `eager`: the answer is begun beside the guard, and cancelled where that refuses; its text waits for the guard.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    guard: float | None = Field(default=0.5, ge=0, le=1)
    requirements: tuple[str, ...] = ()
    met: float = Field(default=0.5, ge=0, le=1)
    unmet: Literal["fallback", "flag"] = "fallback"
    eager: bool = False
    refusal: str = "I cannot help with that."
    fallback: str = "I cannot give a good answer to that."
    params: DrawnParams = SamplingParams(max_tokens=256)


@dataclass(frozen=True, kw_only=True)
class Guarded(FlowResult):
    """What was told, and how that came about.

    `answer` is what was told, as far as it came. `drawn` is the model's own answer, told or not, as far as it came:
    the tokens of one that was cancelled count there, and not in `usage`. `jailbreak` is the guard's probability.
    `transcript` is the conversation to go on with: with what was told, or as it was where the flow was stopped.
    """

    answer: str
    outcome: Outcome
    drawn: Drawn | None
    jailbreak: float | None
    verdicts: tuple[Verdict, ...]
    transcript: Transcript

    @property
    def withheld(self) -> str:
        """The model's own text, where it was not told."""
        return "" if self.drawn is None or self.answer == self.drawn.text else self.drawn.text

    def as_dict(self) -> dict[str, Any]:
        return {
            "answer": self.answer,
            "outcome": self.outcome,
            "drawn": None if self.drawn is None else self.drawn.as_dict(),
            "withheld": self.withheld,
            "jailbreak": self.jailbreak,
            "verdicts": [verdict.as_dict() for verdict in self.verdicts],
            **super().as_dict(),
        }


async def guarded(
    backend: Backend,
    conversation: Chat | Transcript,
    settings: GuardSettings | None = None,
    *,
    run: Run | None = None,
) -> Guarded:
    """Answer a conversation between two checks. What stops the flow is the result's `error`, beside what was found.

    Needs `jailbreak` where there is a guard, and `requirement_check` where there are requirements.
    """
    flow = _Guarded(backend, settings or GuardSettings(), run or Run())
    await flow.run.execute(lambda: flow.play(conversation))
    return flow.run.end(flow.result())


class _Guarded:
    def __init__(self, backend: Backend, settings: GuardSettings, run: Run) -> None:
        self.backend = backend
        self.settings = settings
        self.run = run
        self.requirements = tuple(Requirement(text) for text in settings.requirements)
        self.draft: Draft | None = None
        self.told = ""
        self.outcome: Outcome = "stopped"
        self.jailbreak: float | None = None
        self.verdicts: dict[int, Verdict] = {}
        self.transcript = Transcript()
        self._open = False  # whether the model's text may be told as it comes

    async def play(self, conversation: Chat | Transcript) -> None:
        asked = self.transcript = await transcript_of(self.backend, conversation)
        await self._prepare()
        answered = await (self._beside_guard(asked) if self.settings.eager else self._after_guard(asked))
        if answered is None:
            await self._say(asked, self.settings.refusal, "refused")
        elif await self._meets(answered):
            self._tell_held()
            self.transcript, self.outcome = answered, "answered"
        elif self.settings.unmet == "flag":
            self.transcript, self.outcome = answered, "flagged"
        else:
            await self._say(asked, self.settings.fallback, "withheld")

    def result(self) -> Guarded:
        return Guarded(
            answer=self.told,
            outcome=self.outcome,
            drawn=None if self.draft is None else Drawn(**self.draft.fields()),
            jailbreak=self.jailbreak,
            verdicts=tuple(self.verdicts[number] for number in sorted(self.verdicts)),
            transcript=self.transcript,
            **self.run.finish(),
        )

    # ------------------------------------------------------------------ before the answer

    async def _prepare(self) -> None:
        """An adapter that is missing is named before anything is generated or told."""
        if self.settings.guard is not None:
            find({info.name: info for info in await self.run.adapters_of(self.backend)}, "jailbreak")
        await judgeable(self.backend, self.run, self.requirements)

    async def _after_guard(self, asked: Transcript) -> Transcript | None:
        if await self._refused(asked):
            return None
        self._allow()
        return await self._generate(asked)

    async def _beside_guard(self, asked: Transcript) -> Transcript | None:
        """The guard is heard first, whichever ends first: what fails in an answer that it refuses is nothing."""
        generating = asyncio.create_task(self._generate(asked))
        try:
            if await self._refused(asked):
                return None
            self._allow()
            return await generating
        finally:
            generating.cancel()
            await asyncio.gather(generating, return_exceptions=True)

    async def _refused(self, asked: Transcript) -> bool:
        limit = self.settings.guard
        if limit is None:
            return False
        found = await jailbreak(self.run.backend(self.backend, "guard"), asked)
        self.jailbreak = found.probability
        refused = found.probability >= limit
        reason = f"chance of a jailbreak {found.probability:.2f}, refused from {limit:.2f} on"
        self.run.decide("guard", "refused" if refused else "allowed", reason, found.probability)
        return refused

    # ------------------------------------------------------------------ the answer

    async def _generate(self, asked: Transcript) -> Transcript:
        self.draft = draft = Draft(self.run, 0, heard=self._hear)
        try:
            prompt = await asked.prompt(self.backend)
            return await draft.generate(self.backend, asked, prompt, self.settings.params, quiet=True)
        except MidstreamError as error:
            draft.error = error
            raise

    def _allow(self) -> None:
        """The guard lets the answer be told, unless requirements may still withhold it."""
        if not self.requirements or self.settings.unmet == "flag":
            self._tell_held()
            self._open = True

    def _hear(self, text: str) -> None:
        if self._open:
            self._tell(text)

    def _tell_held(self) -> None:
        if self.draft is not None:
            self._tell(self.draft.text[len(self.told) :])

    def _tell(self, text: str) -> None:
        if text:
            self.told += text
            self.run.tell("text", "answer", {"text": text, "index": 0})

    async def _say(self, asked: Transcript, text: str, outcome: Outcome) -> None:
        self._tell(text)
        self.transcript, self.outcome = await told(self.backend, asked, text), outcome

    # ------------------------------------------------------------------ after the answer

    async def _meets(self, answered: Transcript) -> bool:
        await together([self._judge(answered, number) for number in range(len(self.requirements))])
        return all(verdict.met for verdict in self.verdicts.values())

    async def _judge(self, answered: Transcript, number: int) -> None:
        assert self.draft is not None, "what is judged was generated"
        requirement = self.requirements[number]
        backend = self.draft.judge(self.backend, f"requirement {number}")
        found = self.verdicts[number] = await verdict(backend, answered, requirement, self.settings.met)
        reason = f"{found.probability:.2f}, met from {self.settings.met:.2f} on: {requirement.text}"
        self.run.decide(f"requirement {number}", "met" if found.met else "unmet", reason, found.probability)
