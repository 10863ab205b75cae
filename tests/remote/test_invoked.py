"""Adapters that the base model's own output invokes, over HTTP."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from midstream.engine.engine import AsyncEngine
from midstream.errors import AdapterNotFound, InputError
from midstream.flows.invocable import invocables
from midstream.remote import RemoteBackend
from midstream.types import Choice, Completion, Invocable, Regex, Request, SamplingParams
from tests.server.running import Running
from tests.tiny import tiny_chat

IDS = tuple(range(40, 80))
LABELS = SamplingParams(constraint=Choice(options=("yes", "no")))
FREE = SamplingParams(max_tokens=4, ignore_eos=True, temperature=1.0, seed=5)


def writing(*callees: Invocable, **more: Any) -> Request:
    """A request whose base model invokes an adapter twice."""
    params = SamplingParams(max_tokens=60, constraint=Regex(pattern="[ab]{2}@n:[cd]@n:[ef]"))
    return Request(prompt=IDS, params=params, invocable=callees, **more)


def without_seconds(completion: Completion) -> Any:
    return [
        replace(choice, calls=tuple(replace(call, seconds=0.0) for call in choice.calls))
        for choice in completion.choices
    ]


@pytest.mark.parametrize(
    "request_",
    [
        writing(Invocable(adapter="note", params=LABELS)),
        writing(Invocable(adapter="note", params=FREE, closing=tuple(tiny_chat().encode("!?")))),
        writing(Invocable(adapter="note", params=LABELS), max_invocations=1),
    ],
    ids=["labels", "free", "once"],
)
async def test_calls_are_those_of_the_engine(far: RemoteBackend, near: AsyncEngine, request_: Request) -> None:
    expected = await near.complete(request_)
    assert len(expected.choices[0].calls) == request_.max_invocations if request_.max_invocations < 8 else 2
    found = await far.complete(request_)
    last = [delta async for delta in far.stream(request_)][-1].completion
    assert last is not None
    assert without_seconds(found) == without_seconds(expected)
    assert found.usage == expected.usage
    again = await near.complete(request_)
    assert without_seconds(last) == without_seconds(again)
    assert last.usage == again.usage
    assert all(call.seconds > 0 for call in found.choices[0].calls)


async def test_what_contracts_say_is_the_same_near_and_far(far: RemoteBackend, near: AsyncEngine) -> None:
    found = await invocables(far, ["note", "jailbreak"])
    assert found == await invocables(near, ["note", "jailbreak"])
    assert found[1].closing == tuple(tiny_chat().encode("<|im_end|>\n<|im_start|>assistant\n"))


async def test_refusals_are_those_of_the_engine(far: RemoteBackend, near: AsyncEngine) -> None:
    for request in (writing(Invocable(adapter="nobody")), writing(Invocable(adapter="twin"))):
        with pytest.raises(InputError) as expected:
            await near.complete(request)
        with pytest.raises(type(expected.value)) as found:
            await far.complete(request)
        assert type(found.value) is type(expected.value)
    for backend in (far, near):
        with pytest.raises(InputError, match="leave `invocable` out"):
            await backend.score(writing(Invocable(adapter="note")), [[1]])


BODY = {"structured_outputs": {"regex": "[ab]{2}@n:[cd]"}, "temperature": 0, "max_tokens": 40}


def post(server: Running, path: str, **body: Any) -> tuple[int, Any]:
    prompt = {"messages": [{"role": "user", "content": "hello"}]} if "chat" in path else {"prompt": "hello"}
    response = server.client.post(path, json={**prompt, **BODY, **body})
    return response.status_code, response.json()


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_name_is_enough_the_contract_says_the_rest(server: Running, path: str) -> None:
    status, found = post(server, path, invocable=["note"])
    assert status == 200, found
    (choice,) = found["choices"]
    (call,) = choice["calls"]
    assert call["adapter"] == "note"
    assert call["text"] in ('"yes"', '"no"')
    assert sum(call["probabilities"].values()) == pytest.approx(1)
    text = choice["text"] if "text" in choice else choice["message"]["content"]
    assert f"@n:{call['text']}" in text
    assert call["usage"]["prompt_tokens_details"]["cached_base_tokens"] > 0
    status, spelled = post(server, path, invocable=[{"adapter": "note", "params": {"max_tokens": 2}}])
    assert status == 200
    assert len(spelled["choices"][0]["calls"][0]["token_ids"]) <= 2, "with params, the contract says nothing"
    status, closed = post(server, path, invocable=[{"adapter": "note", "closing": [0]}])
    assert closed["choices"][0]["calls"][0]["text"] == call["text"]
    assert "calls" not in post(server, path)[1]["choices"][0]


def test_a_stream_ends_with_the_calls(server: Running) -> None:
    body = {"prompt": "hello", **BODY, "invocable": ["note"], "stream": True}
    with server.client.stream("POST", "/v1/completions", json=body) as response:
        lines = [line for line in response.iter_lines() if '"calls"' in line]
    assert len(lines) == 1


@pytest.mark.parametrize(
    ("body", "status", "code", "text"),
    [
        ({"invocable": ["nobody"]}, 404, AdapterNotFound.code, "nobody"),
        ({"invocable": ["requirement_check"]}, 400, "invalid_contract", "instruction"),
        ({"invocable": ["note", "note"]}, 400, "invalid_request_error", "more than once"),
        ({"invocable": ["note"], "model": "jailbreak"}, 400, "invalid_request_error", "excludes adapter"),
        ({"invocable": [{"adapter": "note", "params": {"n": 2}}]}, 400, "invalid_request_error", "n must be 1"),
        ({"invocable": [{"adapter": "note", "params": {"odd": 2}}]}, 400, "invalid_request_error", "odd"),
        ({"invocable": ["note"], "max_invocations": 0}, 400, "invalid_request_error", "max_invocations"),
    ],
)
def test_bad_bodies_name_what_is_wrong(
    server: Running, body: dict[str, Any], status: int, code: str, text: str
) -> None:
    found, reply = post(server, "/v1/chat/completions", **body)
    assert (found, reply["error"]["code"]) == (status, code), reply
    assert text in reply["error"]["message"]
