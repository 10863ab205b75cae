"""The agent: by a script, on a tiny random model that its constraints make act, and on the default model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from midstream.backend import Backend
from midstream.engine.engine import AsyncEngine
from midstream.errors import (
    AdapterNotFound,
    BudgetExceeded,
    ConstraintError,
    DeadlineExceeded,
    InputError,
    MidstreamError,
    OutputError,
)
from midstream.flows.agent import AgentRun, AgentSettings, agent, agent_tool
from midstream.flows.agent_prompt import introduction
from midstream.flows.calculator import calculator
from midstream.flows.events import Event
from midstream.flows.flow_tools import intrinsic_tool, search
from midstream.flows.run import Run
from midstream.flows.tools import AnyTool, Tool, tool
from midstream.retrieval import Passage
from midstream.transcript import Transcript
from midstream.types import Chat, Completion, Document, JsonSchema, Message, Request
from tests.flows.backends import END, Scripted, text_of
from tests.flows.engines import check_idle
from tests.flows.sweeps import cancel_at_every_event, fail_at_every_call

CHAT = Chat(messages=(Message(role="user", content="How much is 2 * 3?"),))
PLAIN = AgentSettings(think_tokens=0)
TINY = AgentSettings(max_steps=4, think_tokens=8, act_tokens=90, string_chars=6, observation_chars=60, temperature=1.0)


def use(name: str, **arguments: Any) -> str:
    return json.dumps({"tool": name, "arguments": arguments}, separators=(",", ":"))


def answer(text: str) -> str:
    return json.dumps({"answer": text}, separators=(",", ":"))


def acting(*actions: str, **more: Any) -> Scripted:
    """A backend whose base model acts so, and thinks nothing."""
    return Scripted({None: list(actions)}, **more)


def offered(request: Request) -> set[str]:
    """The actions that a request's constraint allows: names of tools, and `answer`."""
    assert isinstance(request.params.constraint, JsonSchema)
    actions = [each["properties"] for each in json.loads(request.params.constraint.schema_text)["anyOf"]]
    return {each["tool"]["const"] if "tool" in each else "answer" for each in actions}


@tool
async def echo(text: str) -> str:
    """Say it again."""
    return text


# ---------------------------------------------------------------------- the loop


async def test_it_thinks_acts_observes_and_answers() -> None:
    backend = acting("I multiply.", use("calculator", expression="2*3"), "So it is 6.", answer("6"))
    events: list[Event] = []
    found = await agent(backend, CHAT, [calculator, echo], run=Run(seed=1, on_event=events.append))
    assert (found.error, found.answer, found.stopped) == (None, "6", "answered")
    told = introduction([calculator, echo], thinks=True)
    assert text_of(found.transcript.tokens) == (
        f"system: {told}{END}user: How much is 2 * 3?{END}"
        f'assistant: I multiply.\n{{"tool":"calculator","arguments":{{"expression":"2*3"}}}}{END}'
        f'user: Observation: 6{END}assistant: So it is 6.\n{{"answer":"6"}}{END}'
    )
    first, second = found.steps
    assert (first.number, first.thought, first.action) == (1, "I multiply.", "tool")
    assert (first.tool, first.arguments, first.observation) == ("calculator", {"expression": "2*3"}, "6")
    assert (second.thought, second.action, second.text) == ("So it is 6.", "answer", '{"answer":"6"}')
    assert first.tokens + second.tokens == found.tokens_spent
    assert [call.step for call in found.calls] == ["1.think", "1.act", "2.think", "2.act"]
    assert [(decision.step, decision.outcome) for decision in found.decisions] == [
        ("1.act", "calculator"),
        ("2.act", "answer"),
    ]
    steps = [event.step for event in events if event.kind == "step"]
    assert steps == ["1.think", "1.act", "1.calculator", "2.think", "2.act"]
    seen = next(event for event in events if event.kind == "observation")
    assert seen.as_dict() == {
        "kind": "observation",
        "step": "1.calculator",
        "tool": "calculator",
        "arguments": {"expression": "2*3"},
        "text": "6",
        "failed": False,
    }
    assert events[-1].kind == "end"
    assert json.loads(json.dumps(found.as_dict()))["steps"][0]["observation"] == "6"


def test_what_the_model_is_told_of_its_tools() -> None:
    @tool
    def mix(kind: str, n: int | None = None, *, sizes: list[int], deep: dict[str, Any]) -> None:
        """Mix it."""

    text = introduction([calculator, mix], thinks=False)
    assert text == (
        'Write one line of JSON: {"tool":"...","arguments":{...}} to use a tool, or {"answer":"..."} to answer.\n'
        "Tools:\n"
        "- calculator(expression: string): Compute arithmetic: + - * / // % ** ( ) abs round sqrt min max.\n"
        "- mix(kind: string, n?: integer|null, sizes: array, deep: object): Mix it."
    )
    assert introduction([], thinks=True) == 'Write one line of thought, then one line of JSON: {"answer":"..."}'


async def test_the_users_own_system_message_stays() -> None:
    chat = Chat(
        messages=(Message(role="system", content="Be kind."), *CHAT.messages), documents=(Document(text="A passage."),)
    )
    found = await agent(acting(answer("6")), chat, [echo], PLAIN)
    told = introduction([echo], thinks=False)
    head = f"system: Be kind.{END}user: Document [1]:\nA passage.\n\n{told}\n\nHow much is 2 * 3?{END}assistant: "
    assert text_of(found.transcript.tokens).startswith(head)


async def test_a_transcript_is_kept_as_it_is_held_and_told_of_the_tools_once() -> None:
    backend = acting(answer("6"), answer("7"), answer("8"))
    held = await Transcript.of(backend, Chat(messages=(*CHAT.messages, Message(role="assistant", content="Six."))))
    asked = await held.add(backend, Message(role="user", content="Sure?"))
    first = await agent(backend, asked, [echo], PLAIN)
    assert first.transcript.tokens[: len(held.tokens)] == held.tokens
    text = introduction([echo], thinks=False)
    assert text_of(first.transcript.tokens[len(held.tokens) :]).startswith(f"user: {text}\n\nSure?{END}assistant: ")
    again = await first.transcript.add(backend, Message(role="user", content="Really?"))
    second = await agent(backend, again, [echo], PLAIN)
    assert second.answer == "7"
    assert second.transcript.tokens[: len(again.tokens)] == again.tokens
    fresh = await agent(backend, await Transcript.of(backend, CHAT), [echo], PLAIN)
    assert text_of(fresh.transcript.tokens).startswith(f"system: {text}{END}user: How much")


async def test_the_last_step_can_only_answer() -> None:
    backend = acting(use("echo", text="a"), use("echo", text="b"), answer("c"))
    found = await agent(backend, CHAT, [echo], PLAIN.model_copy(update={"max_steps": 3}))
    assert (found.answer, found.stopped, len(found.steps)) == ("c", "max_steps", 3)
    assert [offered(request) for request in backend.requests] == [{"echo", "answer"}] * 2 + [{"answer"}]


async def test_without_tools_it_just_answers() -> None:
    backend = acting(answer("c"))
    found = await agent(backend, CHAT, settings=PLAIN)
    assert (found.answer, found.stopped) == ("c", "answered")
    assert offered(backend.requests[0]) == {"answer"}


# ---------------------------------------------------------------------- what goes wrong


async def test_a_tool_that_fails_or_hangs_is_observed_and_the_loop_goes_on() -> None:
    async def hang() -> None:
        await asyncio.sleep(60)

    def fail() -> None:
        raise ValueError("no such thing")

    nothing = {"type": "object", "properties": {}}
    tools = [Tool("hang", "", nothing, hang), Tool("fail", "", nothing, fail), echo]
    backend = acting(use("hang"), use("fail"), use("echo", txt="a"), use("echo", text="x" * 50), answer("c"))
    settings = PLAIN.model_copy(update={"tool_timeout_s": 0.05, "observation_chars": 40})
    found = await agent(backend, CHAT, tools, settings)
    assert (found.error, found.answer) == (None, "c")
    assert [step.observation for step in found.steps] == [
        "Error: no result within 0.05 s",
        "Error: ValueError: no such thing",
        "Error: Additional properties are not all [cut: 40 of 67 characters]",
        "x" * 40 + " [cut: 40 of 50 characters]",
        None,
    ]
    assert [step.failed for step in found.steps] == [True, True, True, False, False]


@pytest.mark.parametrize(
    "action",
    ['{"answer":"a very long', "no JSON", '{"tool":"other","arguments":{}}', '{"tool":"echo"}', '{"answer":1}', "[]"],
)
async def test_an_action_that_is_not_whole_is_observed_but_in_the_last_step(action: str) -> None:
    found = await agent(acting(action, answer("c")), CHAT, [echo], PLAIN)
    assert (found.error, found.answer) == (None, "c")
    assert (found.steps[0].action, found.steps[0].text) == ("unusable", action)
    assert found.steps[0].observation == "Error: no whole action within 256 tokens: write a shorter one"
    found = await agent(acting(action), CHAT, [echo], PLAIN.model_copy(update={"max_steps": 2}))
    assert isinstance(found.error, OutputError)
    assert (found.stopped, found.answer) == ("error", "")
    assert [step.action for step in found.steps] == ["unusable", "unusable"]


async def test_what_cannot_begin_is_the_results_error() -> None:
    done = Chat(messages=(*CHAT.messages, Message(role="assistant", content="Six.")))
    cases: list[tuple[Any, Sequence[AnyTool], AgentSettings, type[MidstreamError], str]] = [
        (CHAT, [echo, echo], PLAIN, InputError, "same name: echo"),
        (done, [echo], PLAIN, InputError, "must end with a user turn"),
        (Transcript(), [echo], PLAIN, InputError, "must end with a user turn"),
        (CHAT, [echo], AgentSettings(invoke=("sense",)), AdapterNotFound, "'sense'"),
        (CHAT, [echo], AgentSettings(think_tokens=0, invoke=("sense",)), InputError, "think_tokens is 0"),
    ]
    for conversation, tools, settings, kind, reason in cases:
        found = await agent(acting(answer("c")), conversation, tools, settings)
        assert isinstance(found.error, kind)
        assert reason in str(found.error)
        assert (found.steps, found.stopped) == ((), "error")
    for wrong in ({"max_steps": 0}, {"max_depth": 0}, {"tool_timeout_s": 0}, {"unknown": 1}):
        with pytest.raises(ValidationError):
            AgentSettings(**wrong)


async def test_a_missing_intrinsic_stops_the_agent() -> None:
    found = await agent(acting(use("certainty")), CHAT, [intrinsic_tool("certainty")], PLAIN)
    assert isinstance(found.error, AdapterNotFound)
    assert (found.steps[0].tool, found.steps[0].observation) == ("certainty", None)


# ---------------------------------------------------------------------- intrinsics and agents as tools


async def test_an_intrinsic_judges_the_thought_or_the_last_turn() -> None:
    judged: list[str] = []

    def certain(prompt: str, request: Request) -> Mapping[str | int, float]:
        judged.append(prompt)
        return {9: 1.0}

    actions = ["It is 6.", use("certainty"), "I am sure.", answer("6")]
    backend = Scripted({None: actions, "certainty": certain})
    found = await agent(backend, CHAT, [intrinsic_tool("certainty")])
    assert found.answer == "6"
    assert found.steps[0].observation == '{"certainty":0.95}'
    assert judged[0].endswith(f"How much is 2 * 3?{END}assistant: It is 6.\n{END}<certainty>")
    call = found.calls[2]
    assert call.step == "1.certainty"
    # The end of the turn and the invocation: the thought was read for the action.
    assert call.usage.computed_tokens == len(END + "<certainty>")
    backend = Scripted({None: [use("certainty"), answer("6")], "certainty": certain})
    found = await agent(backend, CHAT, [intrinsic_tool("certainty")], PLAIN)
    assert found.steps[0].observation == "Error: ValueError: there is no assistant turn to judge yet"


async def test_an_agent_can_be_a_tool_of_an_agent() -> None:
    backend = acting(use("helper", task="add"), use("echo", text="inner"), answer("from below"), answer("from above"))
    helper = agent_tool("helper", "Does it.", [echo], PLAIN)
    found = await agent(backend, CHAT, [helper], PLAIN, run=Run(seed=1))
    assert found.answer == "from above"
    step = found.steps[0]
    assert step.observation == "from below"
    assert [inner.observation for inner in step.steps] == ["inner", None]
    assert [call.step for call in found.calls] == ["1.act", "1.helper/1.act", "1.helper/2.act", "2.act"]
    assert step.tokens == sum(call.usage.computed_tokens + call.usage.completion_tokens for call in found.calls[:3])
    assert len({request.params.seed for request in backend.requests}) == 4


async def test_agents_nest_as_deep_as_they_may() -> None:
    tools: list[AnyTool] = []
    tools.append(agent_tool("again", "Itself.", tools, PLAIN.model_copy(update={"max_depth": 16})))
    for depth in (1, 2, 3):

        def script(prompt: str, request: Request) -> str:
            return use("again", task="more") if "again" in offered(request) and "more" in prompt else answer("done")

        backend = Scripted({None: script})
        asked = Chat(messages=(Message(role="user", content="more"),))
        settings = PLAIN.model_copy(update={"max_depth": depth, "max_steps": 2})
        found = await agent(backend, asked, tools, settings)
        assert found.error is None
        deepest, steps = 1, found.steps
        while steps[0].steps:
            deepest, steps = deepest + 1, steps[0].steps
        assert deepest == depth


async def test_an_inner_agents_failure_is_observed_and_what_stops_the_run_stops_both() -> None:
    helper = agent_tool("helper", "Does it.", [echo], PLAIN.model_copy(update={"max_steps": 1}))
    found = await agent(acting(use("helper", task="x"), "broken", answer("c")), CHAT, [helper], PLAIN)
    assert found.answer == "c"
    assert found.steps[0].observation.startswith("Error: OutputError: the agent's last step")  # type: ignore[union-attr]
    stopped = await agent(
        acting(use("helper", task="x"), OutputError("x")), CHAT, [helper], PLAIN, run=Run(max_tokens=1)
    )
    assert isinstance(stopped.error, BudgetExceeded)
    assert [inner.number for inner in stopped.steps[0].steps] == [1]


# ---------------------------------------------------------------------- stopping


def calculating(backend: Backend, run: Run) -> Any:
    helper = agent_tool("helper", "Does it.", [echo], PLAIN)
    tools = [calculator, helper, intrinsic_tool("certainty")]
    return agent(backend, CHAT, tools, run=run)


def by_script() -> Scripted:
    actions = [
        *("I multiply.", use("calculator", expression="2*3")),
        *("Is it?", use("certainty")),
        *("I ask.", use("helper", task="x"), use("echo", text="inner"), answer("yes")),
        *("So it is 6.", answer("6")),
    ]
    return Scripted({None: actions, "certainty": {9: 1.0}})


async def test_whichever_call_fails_the_steps_so_far_are_kept() -> None:
    backends: list[Scripted] = []

    def make() -> Scripted:
        backends.append(by_script())
        return backends[-1]

    whole, stopped = await fail_at_every_call(calculating, make)
    assert (whole.answer, len(whole.steps)) == ("6", 4)
    assert len(stopped) > 20
    for found in stopped:
        assert (found.stopped, found.answer) == ("error", "")
        assert_begins(found, whole)
    assert {len(found.steps) for found in stopped} == {0, 1, 2, 3, 4}
    assert not any(backend.running for backend in backends)


async def test_whichever_event_cancels_it_the_steps_so_far_are_kept() -> None:
    whole = await calculating(by_script(), Run(seed=7))
    stopped = await cancel_at_every_event(calculating, by_script)
    assert len(stopped) > 100
    for found in stopped:
        if found.error is not None:
            assert_begins(found, whole)


def assert_begins(found: AgentRun, whole: AgentRun) -> None:
    """A stopped run is the beginning of the whole one."""
    for step, full in zip(found.steps[:-1], whole.steps, strict=False):
        assert (step.thought, step.text, step.observation) == (full.thought, full.text, full.observation)
    if found.steps:
        assert whole.steps[len(found.steps) - 1].thought.startswith(found.steps[-1].thought)
        assert whole.steps[len(found.steps) - 1].text.startswith(found.steps[-1].text)
    assert whole.transcript.tokens[: len(found.transcript.tokens)] == found.transcript.tokens
    json.dumps(found.as_dict())


async def test_a_deadline_ends_a_hanging_tool_and_a_hanging_model() -> None:
    async def forever() -> None:
        await asyncio.sleep(60)

    hanging = Tool("hang", "", {"type": "object", "properties": {}}, forever)
    found = await agent(acting(use("hang")), CHAT, [hanging], PLAIN, run=Run(deadline_s=0.2))
    assert isinstance(found.error, DeadlineExceeded)
    assert found.steps[0].tool == "hang"

    async def wait(request: Request) -> None:
        await asyncio.sleep(60)

    backend = acting(answer("c"), before=wait)
    found = await agent(backend, CHAT, [echo], PLAIN, run=Run(deadline_s=0.2))
    assert isinstance(found.error, DeadlineExceeded)
    assert backend.running == 0


async def test_no_call_begins_when_the_tokens_are_spent() -> None:
    found = await agent(by_script(), CHAT, [calculator], run=Run(max_tokens=10))
    assert isinstance(found.error, BudgetExceeded)
    assert [call.step for call in found.calls] == ["1.think"]
    assert found.steps[0].thought == "I multiply."


# ---------------------------------------------------------------------- on a tiny engine


class Point(BaseModel):
    x: int
    kind: str = "a"


@tool
def move(points: list[Point], fast: bool) -> str:
    """Move."""
    return f"{len(points)} {fast}"


TOOLS: tuple[AnyTool, ...] = (calculator, echo, move)


def _forced_at_the_end(action: str) -> int:
    """How many tokens the schema of `echo` forces at the end: the string's own quote too where it has no more room."""
    try:
        text = json.loads(action)["arguments"]["text"]
    except (ValueError, KeyError):
        return 0  # cut, or an answer, after which nothing comes
    return len('"}}') if len(text) == TINY.string_chars else len("}}")


def prefix(one: Sequence[int], other: Sequence[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


async def test_every_step_computes_what_is_new_and_nothing_else(engine: AsyncEngine) -> None:
    checked = 0
    for seed in range(6):
        found = await agent(engine, CHAT, [echo], TINY, run=Run(seed=seed))
        assert found.error is None or isinstance(found.error, OutputError)
        before: tuple[int, ...] | None = None
        for call in found.calls:
            assert isinstance(call.outcome, Completion)
            prompt, choice = call.outcome.prompt_token_ids, call.outcome.choices[0]
            if before is not None:
                assert call.usage.cached_tokens == min(prefix(prompt, before), len(prompt) - 1)
                checked += 1
            # The last token of an output is never computed, nor what the constraint forced behind the last choice.
            forced = _forced_at_the_end(choice.text) if call.step.endswith("act") else 0
            before = (*prompt, *choice.token_ids)[: len(prompt) + len(choice.token_ids) - 1 - forced]
        for one, other in zip(found.calls, found.calls[1:], strict=False):
            held = one.outcome.prompt_token_ids  # type: ignore[union-attr]
            assert other.outcome.prompt_token_ids[: len(held)] == held  # type: ignore[union-attr]
    assert checked > 20
    await check_idle(engine)


async def test_a_random_model_always_acts_by_the_schemas(engine: AsyncEngine) -> None:
    settings = TINY.model_copy(update={"act_tokens": 400, "max_steps": 5})
    used: set[str | None] = set()
    for seed in range(4):
        found = await agent(engine, CHAT, TOOLS, settings, run=Run(seed=seed))
        for step in found.steps:
            used.add(step.tool)
            if step.action == "tool":
                called = next(each for each in TOOLS if each.name == step.tool)
                assert called.problem(step.arguments or {}) is None
                if called.name != "calculator":
                    assert not step.failed
            elif step.action == "answer":
                assert len(json.loads(step.text)["answer"]) <= settings.string_chars
    assert used >= {"calculator", "echo", "move"}


async def test_the_same_seed_is_the_same_run(engine: AsyncEngine) -> None:
    def of(found: AgentRun) -> list[Any]:
        return [(step.thought, step.text, step.observation) for step in found.steps]

    runs = [of(await agent(engine, CHAT, TOOLS, TINY, run=Run(seed=seed))) for seed in (3, 3, 4)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
    drawn = await agent(engine, CHAT, TOOLS, TINY)
    assert of(drawn) == of(await agent(engine, CHAT, TOOLS, TINY, run=Run(seed=drawn.seed)))


def on_engine(tools: Sequence[AnyTool]) -> Callable[[Backend, Run], Any]:
    settings = TINY.model_copy(update={"max_steps": 2, "think_tokens": 2, "string_chars": 2, "act_tokens": 400})
    return lambda backend, run: agent(backend, CHAT, tools, settings, run=run)


async def test_a_failing_or_cancelled_run_leaves_no_kv_held(engine: AsyncEngine) -> None:
    async def idle() -> None:
        for _ in range(200):  # the engine hears of a cancellation in its own time
            if not (await engine.stats()).running and not (await engine.stats()).queued:
                break
            await asyncio.sleep(0.01)
        await check_idle(engine)

    tools = [intrinsic_tool("certainty"), intrinsic_tool("query_rewrite")]
    whole, stopped = await fail_at_every_call(on_engine(tools), lambda: engine, idle)
    assert whole.steps[0].tool is not None
    assert stopped
    await cancel_at_every_event(on_engine(tools), lambda: engine, idle)


async def test_a_schema_that_cannot_be_constrained_is_named(engine: AsyncEngine) -> None:
    parameters = {"type": "object", "properties": {"a": {"not": {"type": "string"}}}}
    found = await agent(engine, CHAT, [Tool("odd", "", parameters, print)], TINY)
    assert isinstance(found.error, ConstraintError)
    assert "not" in str(found.error)


# ---------------------------------------------------------------------- on the default model


class Lamps:
    async def retrieve(self, query: str, k: int) -> list[Passage]:
        return [Passage(Document(text="Ada's lamp was built in 1843 and cost 12 pounds."), 1.0)]


async def test_the_default_model_uses_a_tool_and_answers_from_it() -> None:
    engine = await asyncio.to_thread(AsyncEngine.load, dtype="float32")
    try:
        asked = Chat(messages=(Message(role="user", content="How many pounds did Ada's lamp cost?"),))
        settings = AgentSettings(max_steps=3, think_tokens=24, act_tokens=64)
        found = await agent(engine, asked, [calculator, search(Lamps())], settings, run=Run(seed=3))
        assert found.error is None
        assert "12" in found.answer
        assert {step.tool for step in found.steps[:-1]} <= {"calculator", "search"}
        assert any("cost 12 pounds" in (step.observation or "") for step in found.steps)
        later = [call.usage for call in found.calls[1:]]
        assert all(usage.computed_tokens < usage.prompt_tokens / 3 for usage in later)
        await check_idle(engine)
    finally:
        await engine.aclose()
