"""Request bodies of flows: what each is given, and how it is begun."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, Field, model_validator

from midstream.backend import Backend
from midstream.errors import InputError
from midstream.flows.agent import AgentRun, AgentSettings, agent
from midstream.flows.best_of_n import BestOfN, BestOfNSettings, best_of_n
from midstream.flows.calculator import calculator
from midstream.flows.flow_tools import intrinsic_tool, search
from midstream.flows.guarded import Guarded, GuardSettings, guarded
from midstream.flows.majority import (
    Majority,
    MajoritySettings,
    WeightedMajoritySettings,
    majority,
    weighted_majority,
)
from midstream.flows.rag import RagSettings, RagTurn, rag_turn
from midstream.flows.repair import Repair, RepairSettings, repair
from midstream.flows.requirements import Requirement
from midstream.flows.run import FlowResult, Run
from midstream.flows.tools import AnyTool
from midstream.retrieval import Bm25Retriever, Retriever
from midstream.server.prompts import chat_of
from midstream.server.schemas import Body, Passage, Turn
from midstream.transcript import Transcript
from midstream.types import Chat

ToolName = Literal[
    "calculator",
    "search",
    "answerability",
    "certainty",
    "hallucination",
    "jailbreak",
    "query_rewrite",
    "requirement_check",
]
Text = Annotated[str, Field(min_length=1, max_length=4096)]
Requirements = Annotated[list[Text], Field(max_length=64)]
Corpus = Annotated[
    list[Passage],
    Field(min_length=1, max_length=4096, description="What is searched, in the place of the server's own documents."),
]


class FlowBody(Body, ABC):
    """What all flows are given. Each subclass adds its `settings`."""

    flow: ClassVar[str]

    messages: list[Turn] = Field(min_length=1, max_length=1024)
    seed: int | None = Field(default=None, ge=0, lt=2**63, description="Makes the run the same each time.")
    deadline_s: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="The flow ends then with what it has."
    )
    max_tokens: int | None = Field(
        default=None, ge=1, description="Tokens that may be computed, prompt positions and answers."
    )
    stream: bool | None = None

    def chat(self) -> Chat:
        """The conversation that is answered."""
        return chat_of(self.messages)

    @abstractmethod
    async def perform(self, backend: Backend, run: Run, docs: Retriever | None) -> FlowResult:
        """Run the flow. `docs` are the server's own documents. Raises InputError for what it cannot begin with."""

    @classmethod
    def settings_type(cls) -> type[BaseModel]:
        """The flow's settings."""
        kind: Any = cls.model_fields["settings"].annotation
        assert issubclass(kind, BaseModel)
        return kind


class _Answering(FlowBody, ABC):
    """A flow that answers the whole conversation."""

    documents: list[Passage] | None = None

    def chat(self) -> Chat:
        return chat_of(self.messages, self.documents)


class RagBody(FlowBody):
    """`POST /v1/flows/rag`: the last message is the question, and passages are found for it."""

    flow = "rag"
    settings: RagSettings = RagSettings()
    corpus: Corpus | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        question = self.messages[-1]
        if question.role != "user":
            raise ValueError("the last message is the question, so its role is user")
        if question.documents:
            raise ValueError("the question has documents already: send what is to be searched as corpus")
        return self

    async def perform(self, backend: Backend, run: Run, docs: Retriever | None) -> RagTurn:
        retriever = await retriever_of(self.corpus, docs)
        *before, question = chat_of(self.messages).messages
        conversation = Chat(messages=tuple(before)) if before else Transcript()
        return await rag_turn(backend, conversation, question.content, retriever, self.settings, run=run)


class BestOfNBody(_Answering):
    """`POST /v1/flows/best-of-n`."""

    flow = "best-of-n"
    settings: BestOfNSettings = BestOfNSettings()

    async def perform(self, backend: Backend, run: Run, docs: Retriever | None) -> BestOfN:
        return await best_of_n(backend, self.chat(), self.settings, run=run)


class MajorityBody(_Answering):
    """`POST /v1/flows/majority`."""

    flow = "majority"
    settings: MajoritySettings = MajoritySettings()

    async def perform(self, backend: Backend, run: Run, docs: Retriever | None) -> Majority:
        return await majority(backend, self.chat(), self.settings, run=run)


class WeightedMajorityBody(_Answering):
    """`POST /v1/flows/weighted-majority`."""

    flow = "weighted-majority"
    settings: WeightedMajoritySettings = WeightedMajoritySettings()

    async def perform(self, backend: Backend, run: Run, docs: Retriever | None) -> Majority:
        return await weighted_majority(backend, self.chat(), self.settings, run=run)


class RepairBody(_Answering):
    """`POST /v1/flows/repair`."""

    flow = "repair"
    requirements: Annotated[Requirements, Field(min_length=1)]
    settings: RepairSettings = RepairSettings()

    async def perform(self, backend: Backend, run: Run, docs: Retriever | None) -> Repair:
        requirements = [Requirement(text) for text in self.requirements]
        return await repair(backend, self.chat(), requirements, self.settings, run=run)


class GuardedBody(_Answering):
    """`POST /v1/flows/guarded`. Requirements stand beside the settings, as those of a repair do, or in them."""

    flow = "guarded"
    requirements: Requirements = Field(default_factory=list)
    settings: GuardSettings = GuardSettings()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.requirements and self.settings.requirements:
            raise ValueError("requirements stand beside the settings or in them: give them once")
        if len(self.settings.requirements) > 64:
            raise ValueError(f"settings has {len(self.settings.requirements)} requirements: at most 64 are judged")
        return self

    async def perform(self, backend: Backend, run: Run, docs: Retriever | None) -> Guarded:
        given = {"requirements": tuple(self.requirements)} if self.requirements else {}
        return await guarded(backend, self.chat(), self.settings.model_copy(update=given), run=run)


class AgentBody(_Answering):
    """`POST /v1/flows/agent`: tools by name; those that are no `calculator` or `search` are intrinsics."""

    flow = "agent"
    tools: list[ToolName] = Field(default=["calculator"], max_length=16, json_schema_extra={"uniqueItems": True})
    corpus: Corpus | None = None
    settings: AgentSettings = AgentSettings()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.tools)) < len(self.tools):
            raise ValueError("tools has a name more than once")
        if self.corpus is not None and "search" not in self.tools:
            raise ValueError("a corpus is for the tool search, which tools does not have")
        return self

    async def perform(self, backend: Backend, run: Run, docs: Retriever | None) -> AgentRun:
        retriever = await retriever_of(self.corpus, docs) if "search" in self.tools else None
        tools = [_tool(name, retriever) for name in self.tools]
        return await agent(backend, self.chat(), tools, self.settings, run=run)


BODIES: tuple[type[FlowBody], ...] = (
    RagBody,
    BestOfNBody,
    MajorityBody,
    WeightedMajorityBody,
    RepairBody,
    GuardedBody,
    AgentBody,
)


async def retriever_of(corpus: Sequence[Passage] | None, docs: Retriever | None) -> Retriever:
    """What a request searches. Raises InputError where there is nothing."""
    if corpus is not None:
        documents = [passage.document() for passage in corpus]
        return await asyncio.to_thread(Bm25Retriever, documents)
    if docs is None:
        raise InputError("there is nothing to search: send a corpus, or start the server with --docs")
    return docs


def _tool(name: str, retriever: Retriever | None) -> AnyTool:
    if name == "calculator":
        return calculator
    if name == "search":
        assert retriever is not None, "search has a retriever"
        return search(retriever)
    return intrinsic_tool(name)
