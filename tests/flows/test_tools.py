"""Tools: their schemas, what an agent sees of their calls, the calculator, and intrinsics as tools."""

from __future__ import annotations

import asyncio
import json
import math
import sys
import threading
from collections.abc import Callable
from datetime import date
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from midstream.engine.engine import AsyncEngine
from midstream.errors import AdapterNotFound, InputError, RetrievalError
from midstream.flows.calculator import calculator, evaluate
from midstream.flows.flow_tools import intrinsic_tool, search
from midstream.flows.run import Run
from midstream.flows.tools import FlowTool, Observation, Place, Tool, as_text, observe, observe_within, tool
from midstream.retrieval import Passage
from midstream.transcript import Transcript
from midstream.types import Chat, Document, Message, Request, SamplingParams
from tests.flows.backends import END, READS, Scripted, text_of
from tests.flows.engines import check_idle

ANY = {"type": "object", "properties": {}}


class Size(BaseModel):
    width: int
    unit: Literal["cm", "in"] = "cm"


def made(run: Callable[..., Any], parameters: dict[str, Any] = ANY) -> Tool:
    return Tool("made", "Made here.", parameters, run)


# ---------------------------------------------------------------------- from functions


async def test_a_typed_function_becomes_a_tool() -> None:
    def resize(schema: str, size: Size, copies: int = 1) -> str:
        """Resize
        a picture.

        At length.
        """
        return f"{schema} {size!r} {copies}"

    made = tool(resize)
    assert (made.name, made.description) == ("resize", "Resize a picture.")
    assert made.parameters["required"] == ["schema", "size"]
    assert made.parameters["additionalProperties"] is False
    seen = await observe(made, {"schema": "a", "size": {"width": 3}}, 5)
    assert seen == Observation("a Size(width=3, unit='cm') 1")
    for wrong, why in [
        ({"schema": "a"}, "'size' is a required property"),
        ({"schema": "a", "size": {"width": "wide"}}, "size.width: 'wide' is not of type 'integer'"),
        ({"schema": "a", "size": {"width": 1}, "more": 1}, "'more' was unexpected"),
    ]:
        seen = await observe(made, wrong, 5)
        assert seen.failed
        assert why in seen.text


async def test_an_async_function_runs_in_the_loop_and_a_sync_one_in_a_thread() -> None:
    @tool
    async def here(n: int) -> str:
        return f"{n} {threading.current_thread().name}"

    @tool
    def there(n: int) -> str:
        return f"{n} {threading.current_thread().name}"

    assert (await observe(here, {"n": 1}, 5)).text == f"1 {threading.current_thread().name}"
    assert (await observe(there, {"n": 2}, 5)).text == "2 midstream-tool"
    assert (await observe(made(lambda: asyncio.sleep(0, "awaited")), {}, 5)).text == "awaited"


def test_what_is_no_tool_is_refused() -> None:
    def positional(a: int, /, b: int) -> int:
        return a + b

    def opaque(a: threading.Lock) -> None: ...

    for function in (positional, opaque, lambda a: a):
        with pytest.raises(InputError):
            tool(function)
    for name in ("", "1a", "a b", "a" * 65, 'a"'):
        with pytest.raises(InputError, match="name"):
            Tool(name, "", ANY, print)
    with pytest.raises(InputError, match="not one of an object"):
        Tool("a", "", {"type": "string"}, print)
    with pytest.raises(InputError, match="no JSON schema"):
        Tool("a", "", {"type": "object", "properties": {"a": {"type": "strange"}}}, print)


# ---------------------------------------------------------------------- observations


def raising(error: BaseException) -> Callable[[], Any]:
    def run() -> Any:
        raise error

    return run


@pytest.mark.parametrize(
    ("run", "text", "failed"),
    [
        (lambda: "a text\nas it is", "a text\nas it is", False),
        (lambda: {"größe": [1, 2.5, None]}, '{"größe":[1,2.5,null]}', False),
        (lambda: Size(width=1), '{"width":1,"unit":"cm"}', False),
        (lambda: date(2020, 1, 2), '"2020-01-02"', False),
        (lambda: math.inf, '"Infinity"', False),
        (lambda: "\ud800", "?", False),
        (raising(ValueError("no\n such   thing")), "Error: ValueError: no such thing", True),
        (raising(ValueError()), "Error: ValueError", True),
        (raising(StopIteration(3)), "Error: RuntimeError: coroutine raised StopIteration", True),
        (raising(TimeoutError("its own")), "Error: TimeoutError: its own", True),
        (raising(RetrievalError("no index")), "Error: RetrievalError: no index", True),
        (raising(SystemExit(1)), "Error: RuntimeError: the tool ended its thread: SystemExit", True),
        (raising(ValueError("\ud800")), "Error: ValueError: ?", True),
    ],
)
async def test_what_a_tool_gives_or_raises_is_seen(run: Callable[[], Any], text: str, failed: bool) -> None:
    assert await observe(made(run), {}, 5) == Observation(text, failed)


async def test_what_is_no_json_is_said() -> None:
    seen = await observe(made(threading.Lock), {}, 5)
    assert seen.failed
    assert seen.text.startswith("Error: PydanticSerializationError: Unable to serialize")


async def test_a_sync_tool_that_hangs_is_left_alone() -> None:
    release, ended = threading.Event(), threading.Event()

    def hang() -> str:
        release.wait(60)
        ended.set()
        return "too late"

    assert await observe(made(hang), {}, 0.05) == Observation("Error: no result within 0.05 s", failed=True)
    release.set()
    await asyncio.to_thread(ended.wait, 60)


async def test_an_async_tool_that_hangs_is_cancelled() -> None:
    cancelled = asyncio.Event()

    async def hang() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            cancelled.set()

    assert (await observe(made(hang), {}, 0.05)).text == "Error: no result within 0.05 s"
    assert cancelled.is_set()


def test_a_thread_that_outlives_its_loop_harms_nobody() -> None:
    release, ended = threading.Event(), threading.Event()

    def hang() -> None:
        release.wait(60)
        ended.set()

    async def main() -> None:
        await observe(made(hang), {}, 0.01)

    asyncio.run(main())
    release.set()
    assert ended.wait(60)


# ---------------------------------------------------------------------- the calculator


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        (" 2 + 3*4 ", 14),
        ("-(2 - 5) ** 2", -9),
        ("7 // 2 + 7 % 4 - +1", 5),
        ("7 / 2", 3.5),
        ("sqrt(16) + abs(-2) + max(1, 2, 3) + min(4, 5)", 13.0),
        ("round(2.567, 2)", 2.57),
        ("round(2.5)", 2),
        ("2 ** -1", 0.5),
        ("0 ** 1000", 0),
        ("1e3", 1000.0),
    ],
)
async def test_arithmetic(expression: str, value: float) -> None:
    assert evaluate(expression) == value
    assert await observe(calculator, {"expression": expression}, 5) == Observation(as_text(value))


@pytest.mark.parametrize(
    "expression",
    [
        "",
        "2 +",
        "__import__('os').system('true')",
        "(1).__class__",
        "[1, 2]",
        "'a' * 9",
        "True + 1",
        "1j",
        "lambda: 1",
        "x",
        "f(1)",
        "abs(x=1)",
        "abs(*[1])",
        "2 if 1 else 3",
        "1 / 0",
        "1 % 0",
        "0 ** -1",
        "9 ** 9 ** 9",
        "10 ** 100",
        "1.5 ** 9999",
        "10 ** 99 * 10 ** 99",
        "(-8) ** 0.5",
        "sqrt(-1)",
        "1e999",
        "1e200",
        "round(5, -10 ** 9)",
        "round(5, 0.5)",
        "max()",
        "max(1)",
        "abs(1, 2)",
        "(" * 49 + ")" * 49,
        "-" * 99,
        "1" * 101,
        "1 + \x00",
        "9 << 9",
        "1 < 2",
    ],
)
def test_what_is_no_arithmetic_or_too_large_is_refused_at_once(expression: str) -> None:
    with pytest.raises(ValueError):
        evaluate(expression)


NUMBERS = st.recursive(
    st.integers(0, 99).map(str),
    lambda each: st.tuples(each, st.sampled_from(["+", "-", "*", "//", "%", "/"]), each).map(
        lambda t: f"({''.join(t)})"
    ),
    max_leaves=8,
)


@given(NUMBERS)
@settings(deadline=None)
def test_the_calculator_computes_what_python_does(expression: str) -> None:
    try:
        expected = eval(expression)
    except ZeroDivisionError:
        with pytest.raises(ValueError, match="zero"):
            evaluate(expression)
    else:
        assert evaluate(expression) == expected


@given(st.text(alphabet="0123456789+-*/%(). ,abrounsqtmix", max_size=110))
@settings(deadline=None)
def test_whatever_is_written_gives_a_number_or_a_value_error(expression: str) -> None:
    try:
        value = evaluate(expression)
    except ValueError:
        return
    assert abs(value) < 10**100
    assert sys.getsizeof(value) < 100


# ---------------------------------------------------------------------- search and intrinsics


FIELDS = {
    "answerability": {"answerable", "probability"},
    "certainty": {"certainty"},
    "hallucination": {"grounded", "probability"},
    "jailbreak": {"jailbreak", "probability"},
    "query_rewrite": {"question"},
}


class Finding:
    def __init__(self, *texts: str) -> None:
        self.texts = texts

    async def retrieve(self, query: str, k: int) -> list[Passage]:
        if query == "broken":
            raise RetrievalError("no index")
        return [Passage(Document(text=text, title=query if n else ""), 1.0) for n, text in enumerate(self.texts)]


async def test_search_gives_the_texts() -> None:
    found = search(Finding("one", "two", "three"), passages=2)
    assert found.name == "search"
    seen = await observe(found, {"query": "q"}, 5)
    assert seen.text == '[{"text":"one"},{"title":"q","text":"two"}]'
    assert (await observe(found, {"query": "broken"}, 5)).text == "Error: RetrievalError: no index"
    assert (await observe(found, {"query": ""}, 5)).failed


async def placed(backend: Any, *turns: str) -> Place:
    roles = ("user", "assistant") * len(turns)
    messages = tuple(Message(role=role, content=text) for role, text in zip(roles, turns, strict=False))
    return Place(Run(), backend, "1.check", await Transcript.of(backend, Chat(messages=messages)), 1)


async def test_intrinsics_are_tools() -> None:
    backend = Scripted(
        {
            "certainty": {9: 1.0},
            "hallucination": {"grounded": 0.123456},
            "jailbreak": {"no": 1.0},
            "query_rewrite": '{"rewritten_question": "What is it?"}',
            "requirement_check": lambda prompt, request: {"met": float("Requirement: Be kind" in prompt)},
        }
    )
    place = await placed(backend, "hello", "hi")
    expected = {
        "certainty": '{"certainty":0.95}',
        "hallucination": '{"grounded":false,"probability":0.1235}',
        "jailbreak": '{"jailbreak":false,"probability":0.0}',
        "query_rewrite": '{"question":"What is it?"}',
    }
    for name, text in expected.items():
        assert await observe_within(intrinsic_tool(name), place, {}) == Observation(text)
    asking = intrinsic_tool("requirement_check")
    assert (await observe_within(asking, place, {"requirement": "Be kind"})).text == '{"met":true,"probability":1.0}'
    assert (await observe_within(asking, place, {})).failed
    given = intrinsic_tool("requirement_check", requirement="Be brief", name="brief")
    assert given.name == "brief"
    assert (await observe_within(given, place, {})).text == '{"met":false,"probability":0.0}'
    assert len(place.run.calls) == 6
    assert {call.step for call in place.run.calls} == {"1.check"}


async def test_what_an_intrinsic_cannot_judge_is_said_and_a_missing_one_is_an_error() -> None:
    backend = Scripted({"certainty": {9: 1.0}})
    place = await placed(backend, "hello")
    seen = await observe_within(intrinsic_tool("certainty"), place, {})
    assert seen == Observation("Error: ValueError: there is no assistant turn to judge yet", failed=True)
    with pytest.raises(AdapterNotFound, match="'jailbreak'"):
        await observe_within(intrinsic_tool("jailbreak"), place, {})
    with pytest.raises(InputError, match="no intrinsic 'sense'"):
        intrinsic_tool("sense")
    with pytest.raises(InputError, match="takes no requirement"):
        intrinsic_tool("certainty", requirement="x")
    unfit = Scripted({"query_rewrite": "no JSON"})
    seen = await observe_within(intrinsic_tool("query_rewrite"), await placed(unfit, "hello"), {})
    assert seen.failed
    assert seen.text.startswith("Error: OutputError")


async def test_an_intrinsic_as_a_tool_reads_its_invocation_and_nothing_else(engine: AsyncEngine) -> None:
    place = await placed(engine, "hello", "hi")
    await engine.complete(Request(prompt=place.transcript.tokens, params=SamplingParams(max_tokens=1)))
    infos = {info.name: info for info in await engine.adapters()}
    for name in READS:
        if name != "requirement_check":
            seen = await observe_within(intrinsic_tool(name), place, {})
            assert set(json.loads(seen.text)) == FIELDS[name]
            assert place.run.calls[-1].usage.computed_tokens == len(infos[name].invocation_tokens), name
    await observe_within(intrinsic_tool("requirement_check"), place, {"requirement": "Be kind"})
    prompt = place.run.calls[-1].outcome.prompt_token_ids  # type: ignore[union-attr]
    assert place.run.calls[-1].usage.computed_tokens == len(prompt) - len(place.transcript.tokens)
    await check_idle(engine)


async def test_the_place_of_a_tool_is_the_conversation_as_it_is() -> None:
    backend = Scripted({None: "x"})
    place = await placed(backend, "hello")

    async def within(place: Place, arguments: Any) -> str:
        return text_of(place.transcript.tokens)

    assert (await observe_within(FlowTool("f", "", ANY, within), place, {})).text == f"user: hello{END}"
