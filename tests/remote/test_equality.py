"""Every verb over HTTP gives what the embedded engine gives."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from midstream.backend import Backend
from midstream.engine.engine import AsyncEngine
from midstream.errors import InputError
from midstream.intrinsics import IntrinsicResult, call_intrinsics
from midstream.remote import RemoteBackend
from midstream.types import (
    Chat,
    Choice,
    Completion,
    Delta,
    Document,
    JsonSchema,
    Message,
    Regex,
    Request,
    SamplingParams,
    TokenLogprob,
)

CHAT = Chat(
    messages=(Message(role="user", content="When was the lighthouse built?"),),
    documents=(Document(text="It was built in 1752.", title="Lizard", doc_id="7"),),
)
IDS = tuple(range(40, 80))
SCHEMA = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"], "additionalProperties": False}

CASES: dict[str, Request] = {
    "base": Request(prompt=IDS, params=SamplingParams(max_tokens=12, ignore_eos=True)),
    "base, a chat": Request(prompt=CHAT, params=SamplingParams(max_tokens=12)),
    "logprobs": Request(prompt=IDS, params=SamplingParams(max_tokens=6, logprobs=True, ignore_eos=True)),
    "top logprobs": Request(
        prompt=IDS, params=SamplingParams(max_tokens=8, logprobs=True, top_logprobs=20, ignore_eos=True)
    ),
    "an aLoRA": Request(prompt=CHAT, adapter="jailbreak", invoke=True, params=SamplingParams(max_tokens=9)),
    "an aLoRA on tokens": Request(prompt=IDS, adapter="certainty", invoke=True, params=SamplingParams(max_tokens=9)),
    "a LoRA": Request(prompt=CHAT, adapter="twin", params=SamplingParams(max_tokens=9, ignore_eos=True)),
    "a choice": Request(
        prompt=CHAT,
        adapter="jailbreak",
        invoke=True,
        params=SamplingParams(constraint=Choice(options=('"yes"', '"no"'))),
    ),
    "a choice that parts twice": Request(
        prompt=IDS, params=SamplingParams(constraint=Choice(options=("ab", "ac", "b")))
    ),
    "a forced choice": Request(prompt=IDS, params=SamplingParams(constraint=Choice(options=("only",)))),
    "a choice with logprobs": Request(
        prompt=IDS,
        params=SamplingParams(constraint=Choice(options=("yes", "no")), logprobs=True, top_logprobs=3),
    ),
    "a regex": Request(prompt=IDS, params=SamplingParams(max_tokens=20, constraint=Regex(pattern="[ab]{4,9}"))),
    "a schema": Request(
        prompt=IDS, params=SamplingParams(max_tokens=40, constraint=JsonSchema(schema_text=json.dumps(SCHEMA)))
    ),
    "a schema of values": Request(
        prompt=IDS,
        params=SamplingParams(max_tokens=40, constraint=JsonSchema(schema_text='{"enum": ["yes", "no"]}')),
    ),
    "three answers": Request(
        prompt=IDS, params=SamplingParams(max_tokens=10, n=3, seed=11, temperature=1.3, top_p=0.9, top_k=40, min_p=0.01)
    ),
    "a large seed": Request(prompt=IDS, params=SamplingParams(max_tokens=5, seed=2**63 - 1, temperature=1.0)),
    "several stop strings": Request(
        prompt=IDS, params=SamplingParams(max_tokens=60, ignore_eos=True, stop=("a", "Q", "zz", "|"))
    ),
    "in a scope": Request(prompt=IDS, cache_scope="tenant", params=SamplingParams(max_tokens=3)),
}


def same_logprobs(one: Sequence[TokenLogprob], other: Sequence[TokenLogprob]) -> None:
    assert [token.token_id for token in one] == [token.token_id for token in other]
    assert [token.text for token in one] == [token.text for token in other]
    for left, right in zip(one, other, strict=True):
        assert left.logprob == pytest.approx(right.logprob, abs=1e-6)
        same_logprobs(left.top, right.top)


def same(one: Completion, other: Completion) -> None:
    assert len(one.choices) == len(other.choices)
    for left, right in zip(one.choices, other.choices, strict=True):
        assert replace(left, logprobs=None, probabilities=None) == replace(right, logprobs=None, probabilities=None)
        assert (left.logprobs is None) == (right.logprobs is None)
        same_logprobs(left.logprobs or (), right.logprobs or ())
        assert (left.probabilities is None) == (right.probabilities is None)
        assert left.probabilities == (right.probabilities and pytest.approx(right.probabilities, abs=1e-6))
    assert one.usage == other.usage
    assert one.prompt_token_ids == other.prompt_token_ids
    assert (one.adapter, one.activation_index) == (other.adapter, other.activation_index)
    assert (one.time_to_first_token_s is None) == (other.time_to_first_token_s is None)
    assert one.seconds > 0
    assert one.request_id


async def streamed(backend: Backend, request: Request) -> tuple[list[Delta], Completion]:
    *pieces, last = [delta async for delta in backend.stream(request)]
    assert last.completion is not None
    assert all(piece.completion is None for piece in pieces)
    return pieces, last.completion


@pytest.mark.parametrize("name", CASES)
async def test_completions_are_those_of_the_engine(far: RemoteBackend, near: AsyncEngine, name: str) -> None:
    same(await far.complete(CASES[name]), await near.complete(CASES[name]))
    same(await far.complete(CASES[name]), await near.complete(CASES[name]))


@pytest.mark.parametrize("name", CASES)
async def test_streams_are_those_of_the_engine(far: RemoteBackend, near: AsyncEngine, name: str) -> None:
    pieces, whole = await streamed(far, CASES[name])
    expected, completion = await streamed(near, CASES[name])
    same(whole, completion)
    for index in range(CASES[name].params.n):
        mine, theirs = ([piece for piece in each if piece.index == index] for each in (pieces, expected))
        assert "".join(piece.text for piece in mine) == completion.choices[index].text
        assert [token for piece in mine for token in piece.token_ids] == [t for p in theirs for t in p.token_ids]
        same_logprobs([t for p in mine for t in p.logprobs], [t for p in theirs for t in p.logprobs])


@pytest.mark.parametrize("adapter", [None, "jailbreak", "twin"])
async def test_scores_are_those_of_the_engine(far: RemoteBackend, near: AsyncEngine, adapter: str | None) -> None:
    request = Request(prompt=CHAT, adapter=adapter, invoke=adapter == "jailbreak")
    continuations = [[40, 41, 42], [43], list(range(60, 90))]
    for _ in range(2):
        one, other = await far.score(request, continuations), await near.score(request, continuations)
        for left, right in zip(one.logprobs, other.logprobs, strict=True):
            assert left == pytest.approx(right, abs=1e-6)
        assert (one.usage, one.activation_index) == (other.usage, other.activation_index)


async def test_a_scope_shares_nothing_with_another(far: RemoteBackend, near: AsyncEngine) -> None:
    request = Request(prompt=tuple(range(90, 130)), params=SamplingParams(max_tokens=1))
    cached = []
    for scope in ("", "one", "one", "two", ""):
        completion = await far.complete(request.model_copy(update={"cache_scope": scope}))
        cached.append(completion.usage.cached_tokens > 0)
    assert cached == [False, False, True, False, True]


async def test_the_adapters_are_described_as_the_engine_knows_them(far: RemoteBackend, near: AsyncEngine) -> None:
    infos = await far.adapters()
    for one, other in zip(infos, await near.adapters(), strict=True):
        assert replace(one, path="") == replace(other, path="")
        assert one.path == one.name, "the server's folders are its own affair"


async def test_a_replaced_adapter_is_seen_at_once(far: RemoteBackend, near: AsyncEngine, server: Any) -> None:
    engine = server.service.engine
    before = engine.adapter("certainty")
    other = engine.adapter("answerability")
    assert before is not None
    assert other is not None
    request = Request(prompt=IDS, adapter="certainty", invoke=True, params=SamplingParams(max_tokens=2))
    await far.complete(request)
    await engine.load_adapter(other.path, name="certainty")
    try:
        completion = await far.complete(request)
        assert completion.prompt_token_ids[-len(other.invocation_tokens) :] == other.invocation_tokens
        assert {info.name: info.digest for info in await far.adapters()}["certainty"] == other.digest
    finally:
        await engine.load_adapter(before.path, name="certainty")


@pytest.mark.parametrize(
    "request_",
    [
        Request(prompt=(1, 10**7)),
        Request(prompt=(1, -5)),
        Request(prompt=()),
        Request(prompt=IDS, adapter="nobody"),
        Request(prompt=IDS, adapter="nobody", invoke=True),
        Request(prompt=IDS, adapter="jailbreak"),
        Request(prompt=IDS, invoke=True),
        Request(prompt=IDS, adapter="twin", invoke=True),
        Request(prompt=IDS, params=SamplingParams(max_tokens=10**6)),
        Request(prompt=IDS, params=SamplingParams(constraint=Regex(pattern="("))),
        Request(prompt=IDS, params=SamplingParams(constraint=JsonSchema(schema_text="{"))),
        Request(prompt=IDS, params=SamplingParams(constraint=Choice(options=("",)))),
        Request(prompt=CHAT.model_copy(update={"tools": ({"type": "function"},)})),
        Request(prompt=CHAT.model_copy(update={"template_arguments": {"tokenize": True}})),
        Request(prompt=Chat(messages=(Message(role="system", content="x"),), documents=(Document(text="y"),))),
    ],
    ids=lambda r: str(r)[:60],
)
async def test_what_the_engine_refuses_is_refused_in_the_same_type(
    far: RemoteBackend, near: AsyncEngine, request_: Request
) -> None:
    with pytest.raises(Exception) as expected:
        await near.complete(request_)
    for work in (far.complete(request_), anext(aiter(far.stream(request_)))):
        with pytest.raises(type(expected.value)) as found:
            await work
        assert type(found.value) is type(expected.value)


@pytest.mark.parametrize("continuations", [[], [[]], [[10**7]]])
async def test_bad_continuations_are_refused(far: RemoteBackend, continuations: list[list[int]]) -> None:
    with pytest.raises(InputError):
        await far.score(Request(prompt=IDS), continuations)


async def test_a_fan_out_is_that_of_the_engine(far: RemoteBackend, near: AsyncEngine) -> None:
    names = ["jailbreak", "answerability", "certainty", "requirement_check", "nobody"]
    chat = CHAT.model_copy(update={"messages": (*CHAT.messages, Message(role="assistant", content="In 1752."))})
    arguments = {"requirement_check": {"requirement": "Be brief."}}
    results = [await call_intrinsics(backend, names, chat, arguments) for backend in (far, near)]
    for one, other in zip(*results, strict=True):
        if not isinstance(one, IntrinsicResult):
            assert type(one) is type(other)
            continue
        assert isinstance(other, IntrinsicResult)
        assert (one.result, one.activation_index) == (other.result, other.activation_index)
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-6)
        assert math.isclose(sum((one.probabilities or {}).values()), 1.0, abs_tol=1e-6)


async def test_a_backend_keeps_the_protocol(far: RemoteBackend) -> None:
    assert isinstance(far, Backend)
    assert isinstance(far.stream(CASES["base"]), AsyncIterator)
