"""An agent's run with all that it needs to be run again: what its trace keeps of the command line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from midstream.backend import Backend, Portal
from midstream.cli.flow.common import Asked, Place, perform
from midstream.errors import ReplayError
from midstream.flows.agent import AgentRun, AgentSettings, agent
from midstream.flows.calculator import calculator
from midstream.flows.flow_tools import search
from midstream.flows.replay import ReplayBackend
from midstream.flows.run import Run
from midstream.flows.tools import AnyTool
from midstream.flows.trace import Recorder, Trace
from midstream.retrieval import Retriever
from midstream.types import Chat


class Play(BaseModel):
    """What an agent is to do. `searches`: it has a search tool. `max_tokens`: those of its run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    conversation: Chat
    settings: AgentSettings
    searches: bool
    max_tokens: int | None

    async def perform(
        self, backend: Backend, retriever: Retriever | None, run: Run, trace: Path | None = None
    ) -> AgentRun:
        """Run the agent, and write its trace to a file if there is one."""
        recorder = Recorder(backend)
        tools: list[AnyTool] = [calculator]
        if retriever is not None:
            tools.append(search(retriever))
        result = await agent(backend if trace is None else recorder, self.conversation, tools, self.settings, run=run)
        if trace is not None:
            recorder.trace(result, self).save(trace)
        return result


def replayed(file: Path, *, as_json: bool) -> AgentRun:
    """Run a trace again. Raises ReplayError where it is none of this command's."""
    trace = Trace.load(file)
    try:
        play = Play.model_validate(trace.settings)
    except ValidationError as error:
        raise ReplayError(f"{file} was not written by `midstream flow agent --trace`: replay it in Python") from error
    backend = ReplayBackend(trace)
    retriever = backend.retriever() if play.searches else None
    asked = Asked(None, "", None, None, trace.seed, None, play.max_tokens, as_json)
    return perform(lambda _, run: play.perform(backend, retriever, run), asked, "beside", where=_without_model(backend))


@contextmanager
def _without_model(backend: Backend) -> Iterator[Place]:
    portal = Portal()
    try:
        yield Place(backend, portal)
    finally:
        portal.close()
