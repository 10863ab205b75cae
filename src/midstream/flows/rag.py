"""A turn of a retrieval chat: guarded, rewritten, retrieved for, answered if it can be, and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from midstream.backend import Backend
from midstream.errors import MidstreamError, OutputError, RetrievalError
from midstream.flows.answer import answer, told, transcript_of
from midstream.flows.draft import DrawnParams
from midstream.flows.run import FlowResult, Run
from midstream.intrinsics import answerability, certainty, hallucination, jailbreak, query_rewrite, requirement_check
from midstream.retrieval import Passage, Retriever
from midstream.together import together
from midstream.transcript import Transcript
from midstream.types import Chat, Message, SamplingParams

Outcome = Literal["answered", "refused", "unanswerable", "clarified", "stopped"]

_CLARIFY = (
    "The documents do not answer my question. Do not answer it. "
    "Ask me one short question that would help you to find what I need."
)


class RagSettings(BaseModel):
    """Which steps a turn takes, and its thresholds: probabilities between 0 and 1; None leaves a step out.

    `guard`: refused from this probability of a jailbreak on. `answerable`: not answered below it; `unanswerable` says
    what happens then, a plain statement or a question back. Where no passage is found the probability is 0.
    `grounded` (where there are passages), `certain`, `met`: below it the answer is given, but not `trusted`.
    `requirement` is checked where there is one. `passages`: how many to find; with 0 nothing is searched for, and the
    steps around the search are left out.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    passages: int = Field(default=3, ge=0, le=64)
    guard: float | None = Field(default=0.5, ge=0, le=1)
    rewrite: bool = True
    answerable: float | None = Field(default=0.5, ge=0, le=1)
    unanswerable: Literal["say", "clarify"] = "say"
    grounded: float | None = Field(default=0.5, ge=0, le=1)
    certain: float | None = Field(default=0.2, ge=0, le=1)
    requirement: str | None = Field(default=None, min_length=1)
    met: float = Field(default=0.5, ge=0, le=1)
    refusal: str = "I cannot help with that."
    unknown: str = "I cannot find that in the documents."
    params: DrawnParams = SamplingParams(max_tokens=256)


@dataclass(frozen=True, kw_only=True)
class RagTurn(FlowResult):
    """A turn and how it came about.

    `query` is what was searched for, `scores` the probability that each check gave. `transcript` is the conversation
    to go on with: with this turn, or without it where the turn was stopped before its answer was whole; `answer` is
    then what there is of it. (It is empty where a Chat was given and the turn was stopped before it was read.)
    `trusted`: it was answered, and no check that was made failed.
    """

    question: str
    query: str
    passages: tuple[Passage, ...]
    answer: str
    outcome: Outcome
    scores: Mapping[str, float]
    trusted: bool
    transcript: Transcript

    def as_dict(self) -> dict[str, Any]:
        return {
            "question": self.question,
            "query": self.query,
            "passages": [passage.as_dict() for passage in self.passages],
            "answer": self.answer,
            "outcome": self.outcome,
            "scores": dict(self.scores),
            "trusted": self.trusted,
            **super().as_dict(),
        }


async def rag_turn(
    backend: Backend,
    conversation: Chat | Transcript,
    question: str,
    retriever: Retriever,
    settings: RagSettings | None = None,
    *,
    run: Run | None = None,
) -> RagTurn:
    """Answer the next question of a conversation from documents that are retrieved for it.

    An empty conversation is `Transcript()`. What stops the turn is the result's `error`, beside all that was found.
    Needs the intrinsics of the steps that are asked for: jailbreak, query_rewrite, answerability, hallucination,
    certainty, requirement_check.
    """
    turn = _Turn(backend, retriever, settings or RagSettings(), run or Run(), question)
    if isinstance(conversation, Transcript):
        turn.transcript = conversation
    await turn.run.execute(lambda: turn.play(conversation))
    return turn.run.end(turn.result())


class _Refused(Exception):
    """The guard has refused the question: what else is being done for it is in vain."""


class _Turn:
    """What a turn has found so far."""

    def __init__(self, backend: Backend, retriever: Retriever, settings: RagSettings, run: Run, question: str) -> None:
        self.backend = backend
        self.retriever = retriever
        self.settings = settings
        self.run = run
        self.question = question
        self.query = question
        self.passages: tuple[Passage, ...] = ()
        self.answer = ""
        self.outcome: Outcome = "stopped"
        self.scores: dict[str, float] = {}
        self.trusted = True
        self.transcript = Transcript()

    async def play(self, conversation: Chat | Transcript) -> None:
        self.transcript = await transcript_of(self.backend, conversation)
        asked = await self.transcript.add(self.backend, Message(role="user", content=self.question))
        try:
            await together([self._guard(asked), self._rewrite(asked)])
        except _Refused:
            await self._say(asked, self.settings.refusal, "refused")
            return
        await self._retrieve()
        documents = tuple(passage.document for passage in self.passages)
        turn = Message(role="user", content=self.question, documents=documents)
        asked = await self.transcript.add(self.backend, turn)
        if await self._answerable(asked):
            await self._check(await self._answer(asked))
        elif self.settings.unanswerable == "say":
            await self._say(asked, self.settings.unknown, "unanswerable")
        else:
            await self._clarify(turn, asked)

    def result(self) -> RagTurn:
        return RagTurn(
            question=self.question,
            query=self.query,
            passages=self.passages,
            answer=self.answer,
            outcome=self.outcome,
            scores=self.scores,
            trusted=self.trusted and self.outcome == "answered" and self.run.error is None,
            transcript=self.transcript,
            **self.run.finish(),
        )

    # ------------------------------------------------------------------ before the answer

    async def _guard(self, asked: Transcript) -> None:
        limit = self.settings.guard
        if limit is None:
            return
        found = await jailbreak(self.run.backend(self.backend, "guard"), asked)
        self.scores["jailbreak"] = found.probability
        refused = found.probability >= limit
        reason = f"chance of a jailbreak {found.probability:.2f}, refused from {limit:.2f} on"
        self.run.decide("guard", "refused" if refused else "allowed", reason, found.probability)
        if refused:
            raise _Refused

    async def _rewrite(self, asked: Transcript) -> None:
        if not self.settings.rewrite or not self.settings.passages:
            return
        if not any(message.role == "user" for message in asked.messages[:-1]):
            self.run.decide("rewrite", "kept", "the first question has nothing before it to refer to")
            return
        try:
            found = await query_rewrite(self.run.backend(self.backend, "rewrite"), asked)
        except OutputError as error:
            # One that was cut short, say. The question itself still finds something.
            self.run.decide("rewrite", "kept", f"the rewritten question cannot be read: {error}")
            return
        query = found.question.strip()
        if query:
            self.query = query
            self.run.decide("rewrite", "rewritten", f"searching for: {query}")
        else:
            self.run.decide("rewrite", "kept", "the rewritten question was empty")

    async def _retrieve(self) -> None:
        if not self.settings.passages:
            return
        self.run.tell("step", "retrieve")
        try:
            found = await self.retriever.retrieve(self.query, self.settings.passages)
            passages = tuple(islice(found, self.settings.passages))
        except MidstreamError:
            raise
        except Exception as error:
            # A retriever is the caller's own and may raise anything.
            raise RetrievalError(f"retrieval failed: {type(error).__name__}: {error}") from error
        if not all(isinstance(passage, Passage) for passage in passages):
            raise RetrievalError("the retriever gave something else than passages")
        self.passages = passages
        self.run.decide("retrieve", f"{len(self.passages)} passages", f"found for: {self.query}")

    async def _answerable(self, asked: Transcript) -> bool:
        limit = self.settings.answerable
        if limit is None or not self.settings.passages:
            return True
        if not self.passages:
            self.run.decide("answerable", "no" if limit else "yes", "no passage was found", 0.0)
            return not limit
        found = await answerability(self.run.backend(self.backend, "answerable"), asked)
        self.scores["answerability"] = found.probability
        answered = found.probability >= limit
        reason = f"chance that the passages answer it {found.probability:.2f}, answered from {limit:.2f} on"
        self.run.decide("answerable", "yes" if answered else "no", reason, found.probability)
        return answered

    # ------------------------------------------------------------------ the answer

    async def _answer(self, asked: Transcript) -> Transcript:
        backend = self.run.backend(self.backend, "answer")
        answered, completion = await answer(backend, asked, self._params(), on_text=self._grow)
        self._end(answered, completion.text, "answered")
        return answered

    async def _clarify(self, turn: Message, asked: Transcript) -> None:
        """Let the base model ask back. What tells it to do so ends the turn, because some templates refuse a second
        user turn, and does not stay in the conversation."""
        backend = self.run.backend(self.backend, "clarify")
        instruction = turn.model_copy(update={"content": f"{turn.content}\n\n{_CLARIFY}"})
        instructed = await self.transcript.add(backend, instruction)
        _, completion = await answer(backend, instructed, self._params(), on_text=self._grow)
        self._end(await told(backend, asked, completion.text), completion.text, "clarified")

    def _params(self) -> SamplingParams:
        params = self.settings.params
        return params.model_copy(update={"seed": self.run.seed})

    async def _say(self, asked: Transcript, text: str, outcome: Outcome) -> None:
        self.run.tell("text", "answer", {"text": text, "index": 0})
        self._end(await told(self.backend, asked, text), text, outcome)

    def _grow(self, text: str) -> None:
        self.answer += text

    def _end(self, transcript: Transcript, text: str, outcome: Outcome) -> None:
        self.transcript, self.answer, self.outcome = transcript, text, outcome

    # ------------------------------------------------------------------ after the answer

    async def _check(self, answered: Transcript) -> None:
        await together([self._grounded(answered), self._certain(answered), self._met(answered)])

    async def _grounded(self, answered: Transcript) -> None:
        # Without passages there is nothing to be grounded in.
        if self.settings.grounded is not None and self.passages:
            found = await hallucination(self.run.backend(self.backend, "grounded"), answered)
            self._judge("grounded", "hallucination", found.probability, self.settings.grounded)

    async def _certain(self, answered: Transcript) -> None:
        if self.settings.certain is not None:
            found = await certainty(self.run.backend(self.backend, "certain"), answered)
            self._judge("certain", "certainty", found.certainty, self.settings.certain)

    async def _met(self, answered: Transcript) -> None:
        requirement = self.settings.requirement
        if requirement is not None:
            found = await requirement_check(self.run.backend(self.backend, "met"), answered, requirement)
            self._judge("met", "requirement_check", found.probability, self.settings.met)

    def _judge(self, step: str, intrinsic: str, value: float, limit: float) -> None:
        self.scores[intrinsic] = value
        passed = value >= limit
        self.trusted = self.trusted and passed
        self.run.decide(
            step, "yes" if passed else "no", f"{intrinsic} gave {value:.2f}, trusted from {limit:.2f} on", value
        )
