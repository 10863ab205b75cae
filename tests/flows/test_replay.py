"""Runs are recorded, saved, and replayed without a model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from midstream.backend import Backend
from midstream.engine.engine import AsyncEngine
from midstream.errors import (
    AdapterFormatError,
    Cancelled,
    DeadlineExceeded,
    ForwardFailed,
    MidstreamError,
    ReplayError,
)
from midstream.flows.agent import AgentSettings, agent, agent_tool
from midstream.flows.best_of_n import BestOfNSettings, best_of_n
from midstream.flows.calculator import calculator
from midstream.flows.flow_tools import intrinsic_tool
from midstream.flows.rag import RagSettings, rag_turn
from midstream.flows.replay import ReplayBackend
from midstream.flows.run import FlowResult, Run
from midstream.flows.tools import Tool, tool
from midstream.flows.trace import Recorder, Trace, TracedError
from midstream.retrieval import Passage
from midstream.together import together
from midstream.transcript import Transcript
from midstream.types import Chat, Document, Message, Request, SamplingParams
from tests.flows.backends import Failing, Scripted
from tests.flows.test_agent import answer, use

CHAT = Chat(messages=(Message(role="user", content="How much is 2 * 3?"),))
TINY = AgentSettings(max_steps=4, think_tokens=8, act_tokens=120, string_chars=6, temperature=1.0)


def timeless(value: Any) -> Any:
    """A result without the times that only the run itself took."""
    if isinstance(value, dict):
        return {key: timeless(each) for key, each in value.items() if key != "seconds"}
    return [timeless(each) for each in value] if isinstance(value, list) else value


async def replayed(
    tmp_path: Path,
    backend: Backend,
    flow: Callable[[Any, Run], Awaitable[FlowResult]],
    *,
    seed: int = 1,
) -> tuple[FlowResult, FlowResult, ReplayBackend]:
    """What a flow gives, what its replay from the saved file gives, and the replay."""
    recorder = Recorder(backend)
    recorded = await flow(recorder, Run(seed=seed))
    recorder.trace(recorded).save(tmp_path / "trace.json")
    trace = Trace.load(tmp_path / "trace.json")
    assert (trace.flow, trace.seed) == (type(recorded).__name__, seed)
    assert trace.result == json.loads(json.dumps(recorded.as_dict()))
    replay = ReplayBackend(trace, patience_s=2)
    return recorded, await flow(replay, Run(seed=trace.seed)), replay


def assert_same(recorded: FlowResult, again: FlowResult) -> None:
    assert timeless(again.as_dict()) == timeless(recorded.as_dict())


# ---------------------------------------------------------------------- the same run


class Counting:
    """A tool that never gives the same twice."""

    def __init__(self) -> None:
        self.calls = 0

    def tool(self) -> Tool:
        @tool
        def count(text: str) -> int:
            """Count."""
            self.calls += 1
            if self.calls % 3 == 0:
                raise ValueError("three")
            return self.calls

        return count


async def test_an_agent_is_replayed_without_a_model_and_without_its_tools(engine: AsyncEngine, tmp_path: Path) -> None:
    acted = 0
    for seed in range(3):
        counting = Counting()
        helper = agent_tool("helper", "Does it.", [counting.tool()], TINY)
        tools = [counting.tool(), helper, intrinsic_tool("jailbreak"), intrinsic_tool("certainty")]

        async def flow(backend: Backend, run: Run, tools: Sequence[Any] = tools) -> FlowResult:
            return await agent(backend, CHAT, tools, TINY, run=run)

        recorder = Recorder(engine)
        recorded = await flow(recorder, Run(seed=seed))
        called = counting.calls
        acted += called
        recorder.trace(recorded, TINY).save(tmp_path / "trace.json")
        trace = Trace.load(tmp_path / "trace.json")
        assert AgentSettings(**trace.settings) == TINY
        replay = ReplayBackend(trace)
        assert_same(recorded, await flow(replay, Run(seed=trace.seed)))
        assert counting.calls == called, "no tool is called"
        assert replay.unused == ()
    assert acted


async def test_events_are_replayed_too(tmp_path: Path) -> None:
    script = ["I multiply.", use("calculator", expression="2*3"), "So it is 6.", answer("6")]
    told: list[list[Any]] = []

    async def flow(backend: Backend, run: Run) -> FlowResult:
        events: list[Any] = []
        told.append(events)
        heard = Run(seed=run.seed, on_event=lambda event: events.append(timeless(event.as_dict())))
        return await agent(backend, CHAT, [calculator], run=heard)

    recorded, again, _ = await replayed(tmp_path, Scripted({None: script}), flow)
    assert_same(recorded, again)
    assert told[0] == told[1]
    assert len(told[0]) > 50


async def test_best_of_n_is_replayed_in_the_order_in_which_answers_came(tmp_path: Path) -> None:
    def script(prompt: str, request: Request) -> str:
        return f"{request.params.seed or 0:x}"[:6]

    asked = 0

    async def before(request: Request) -> None:
        nonlocal asked
        asked += 1
        for _ in range(100 // asked):  # earlier ones take longer
            await asyncio.sleep(0)

    document = Document(text="Six.")
    chat = Chat(messages=(CHAT.messages[0].model_copy(update={"documents": (document,)}),))
    backend = Scripted({None: script, "hallucination": {"grounded": 0.75}, "certainty": {7: 1.0}}, before=before)
    params = SamplingParams(max_tokens=12, temperature=1.0)

    async def flow(backend: Backend, run: Run) -> FlowResult:
        return await best_of_n(backend, chat, BestOfNSettings(n=4, params=params), run=run)

    recorded, again, replay = await replayed(tmp_path, backend, flow)
    assert recorded.error is None
    assert len({call.request.params.seed for call in recorded.calls if call.request.adapter is None}) == 4
    assert_same(recorded, again)
    assert replay.unused == ()


class Finding:
    async def retrieve(self, query: str, k: int) -> list[Passage]:
        return [Passage(Document(text=f"About {query}", doc_id="d1"), 1.5)]


async def test_a_retrieval_turn_is_replayed_with_its_retriever(tmp_path: Path) -> None:
    backend = Scripted({None: "It is 6.", "hallucination": {"grounded": 0.75}, "certainty": {7: 1.0}})
    settings = RagSettings(guard=None, answerable=None, rewrite=False)
    recorder = Recorder(backend)
    recorded = await rag_turn(recorder, Transcript(), "Well?", recorder.retriever(Finding()), settings, run=Run(seed=1))
    assert recorded.error is None
    replay = ReplayBackend(recorder.trace(recorded, settings))
    again = await rag_turn(replay, Transcript(), "Well?", replay.retriever(), settings, run=Run(seed=1))
    assert_same(recorded, again)
    assert again.passages[0].document.doc_id == "d1"
    assert replay.unused == ()


async def test_a_turn_whose_guard_refuses_is_replayed_with_what_it_left(tmp_path: Path) -> None:
    async def slow(request: Request) -> None:
        if request.adapter == "query_rewrite":
            await asyncio.sleep(60)

    backend = Scripted({"jailbreak": {"yes": 1.0}, "query_rewrite": "never"}, before=slow)
    held = await Transcript.of(backend, Chat(messages=(*CHAT.messages, Message(role="assistant", content="Six."))))

    async def flow(backend: Backend, run: Run) -> FlowResult:
        return await rag_turn(backend, held, "Well?", Finding(), run=run)

    recorded, again, _ = await replayed(tmp_path, backend, flow)
    assert recorded.as_dict()["outcome"] == "refused"
    assert any(isinstance(call.outcome, Cancelled) for call in recorded.calls)
    assert_same(recorded, again)


async def test_every_failure_is_replayed(tmp_path: Path) -> None:
    script = ["I multiply.", use("calculator", expression="2*3"), use("calculator", expression="1"), answer("6")]

    async def flow(backend: Backend, run: Run) -> FlowResult:
        return await agent(backend, CHAT, [calculator], run=run)

    whole = Failing(Scripted({None: script}), None)
    await flow(whole, Run(seed=1))
    for at in range(len(whole.calls)):
        failing = Failing(Scripted({None: script}), at, deltas=2)
        recorded, again, _ = await replayed(tmp_path, failing, flow)
        assert isinstance(again.error, ForwardFailed)
        assert_same(recorded, again)


async def test_scores_and_equal_requests_are_answered_in_order(tmp_path: Path) -> None:
    backend = Scripted({None: ["one", "two", "three", {"x": 0.25, "y": 0.0}]})
    recorder = Recorder(backend)
    request = Request(prompt=(65,), deadline_s=5.0)
    given = [await recorder.complete(request) for _ in range(3)]
    score = await recorder.score(request, [[120], [121]])
    path = tmp_path / "trace.json"
    recorder.trace(FlowResult(error=None, decisions=(), calls=(), seconds=0.0, seed=3), {"a": 1}).save(path)
    replay = ReplayBackend(Trace.load(path))
    later = request.model_copy(update={"deadline_s": 1.0})
    assert await together(replay.complete(later) for _ in range(3)) == given
    again = await replay.score(request, ((120,), (121,)))
    assert again == score
    assert again.totals[1] == float("-inf")
    with pytest.raises(ReplayError, match="the trace has no more of complete"):
        await replay.complete(request)


# ---------------------------------------------------------------------- another run


async def test_other_settings_are_a_replay_error_that_names_what_differs(tmp_path: Path) -> None:
    script = ["I multiply.", use("calculator", expression="2*3"), "So it is 6.", answer("6")]
    recorder = Recorder(Scripted({None: script}))
    recorded = await agent(recorder, CHAT, [calculator], run=Run(seed=1))
    trace = recorder.trace(recorded)
    other = Chat(messages=(Message(role="user", content="How much is 2 * 4?"),))
    cases: list[tuple[Chat, Sequence[Any], AgentSettings, int, str]] = [
        (CHAT, [calculator], AgentSettings(temperature=0.5), 1, "params.temperature was 0.0 and is 0.5"),
        (CHAT, [calculator], AgentSettings(think_tokens=9), 1, "params.max_tokens was 48 and is 9"),
        (CHAT, [calculator], AgentSettings(string_chars=9), 1, "params.constraint.schema_text was"),
        (CHAT, [calculator], AgentSettings(), 2, "params.seed was"),
        (CHAT, [], AgentSettings(), 1, "prompt.messages"),
        (other, [calculator], AgentSettings(), 1, "prompt.messages"),
    ]
    for chat, tools, settings, seed, reason in cases:
        replay = ReplayBackend(trace)
        again = await agent(replay, chat, tools, settings, run=Run(seed=seed))
        assert isinstance(again.error, ReplayError)
        assert reason in str(again.error)
        assert replay.unused
    fewer = await agent(ReplayBackend(trace), CHAT, [calculator], AgentSettings(max_steps=1), run=Run(seed=1))
    assert isinstance(fewer.error, ReplayError)


async def test_a_call_that_is_not_made_again_is_missed() -> None:
    recorder = Recorder(Scripted({None: ["one", "two"]}))
    first, second = Request(prompt=(65,)), Request(prompt=(66,))
    await recorder.complete(first)
    await recorder.complete(second)
    trace = recorder.trace(FlowResult(error=None, decisions=(), calls=(), seconds=0.0, seed=3))
    replay = ReplayBackend(trace, patience_s=0.05)
    with pytest.raises(ReplayError, match="had a complete of the base model before this, and this run has not"):
        await replay.complete(second)
    assert [entry.asked["prompt"] for entry in replay.unused] == [[65]]


async def test_where_the_recorded_run_was_stopped_the_replay_stops() -> None:
    async def wait(request: Request) -> None:
        await asyncio.sleep(60)

    recorder = Recorder(Scripted({None: "one"}, before=wait))
    recorded = await agent(recorder, CHAT, run=Run(seed=1, deadline_s=0.05))
    assert isinstance(recorded.error, DeadlineExceeded)
    replay = ReplayBackend(recorder.trace(recorded), patience_s=0.05)
    again = await agent(replay, CHAT, run=Run(seed=1))
    assert isinstance(again.error, ReplayError)
    assert "was stopped while it waited for a stream of the base model" in str(again.error)


# ---------------------------------------------------------------------- files and errors


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "cannot be read as a trace"),
        ("[]", "its format is None"),
        ('{"format": 2}', "no trace of format 1: its format is 2"),
        ('{"format": 1}', "flow: Field required"),
        (
            '{"format": 1, "flow": "x", "seed": 1, "settings": {}, "result": {}, "entries": [], "more": 1}',
            "more: Extra",
        ),
    ],
)
def test_what_is_no_trace_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "trace.json").write_text(text)
    with pytest.raises(ReplayError, match=reason):
        Trace.load(tmp_path / "trace.json")
    with pytest.raises(ReplayError, match="cannot be read"):
        Trace.load(tmp_path / "none.json")


def test_errors_come_back_as_they_were() -> None:
    error = AdapterFormatError("here", ["one", "two"])
    again = TracedError.model_validate_json(TracedError.of(error).model_dump_json()).restored()
    assert type(again) is AdapterFormatError
    assert (str(again), again.folder, list(again.violations)) == (str(error), "here", ["one", "two"])
    assert str(TracedError.of(MidstreamError("x")).restored()) == "x"
    with pytest.raises(ReplayError, match="unknown type Strange"):
        TracedError(type="Strange", message="x").restored()
