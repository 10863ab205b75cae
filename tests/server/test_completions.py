"""The two completion endpoints in OpenAI's format."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.server.running import Running, settled

CHAT = [{"role": "user", "content": "hello there"}]


def chat(live: Running, status: int = 200, **body: Any) -> Any:
    response = live.client.post("/v1/chat/completions", json={"messages": CHAT, "max_tokens": 8, **body})
    assert response.status_code == status, response.text
    return response.json()


def events(live: Running, path: str, **body: Any) -> list[Any]:
    with live.client.stream("POST", path, json={"stream": True, "max_tokens": 8, **body}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_a_chat_completion(live: Running) -> None:
    found = chat(live, temperature=0, ignore_eos=True)
    assert found["object"] == "chat.completion"
    assert found["id"].startswith("chatcmpl-")
    assert found["model"] == "tiny"
    (choice,) = found["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["role"] == "assistant"
    usage = found["usage"]
    assert usage["completion_tokens"] == 8
    assert usage["total_tokens"] == usage["prompt_tokens"] + 8
    assert usage["prompt_tokens"] == usage["computed_tokens"] + usage["prompt_tokens_details"]["cached_tokens"]
    again = chat(live, temperature=0, ignore_eos=True)
    assert again["choices"][0]["message"] == choice["message"]
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"] - 1


def test_a_stream_says_the_same_as_the_whole(live: Running) -> None:
    settings = {"messages": CHAT, "temperature": 0, "ignore_eos": True, "logprobs": True, "top_logprobs": 2}
    chunks = events(live, "/v1/chat/completions", stream_options={"include_usage": True}, **settings)
    whole = chat(live, **settings)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    *pieces, last = chunks
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 8
    assert all(chunk["usage"] is None for chunk in pieces)
    assert pieces[0]["choices"][0]["delta"]["role"] == "assistant"
    text = "".join(piece["choices"][0]["delta"].get("content", "") for piece in pieces)
    assert text == whole["choices"][0]["message"]["content"]
    assert [p["choices"][0]["finish_reason"] for p in pieces] == [None] * (len(pieces) - 1) + ["length"]
    streamed = [
        entry for p in pieces if p["choices"][0]["logprobs"] for entry in p["choices"][0]["logprobs"]["content"]
    ]
    assert [entry["token"] for entry in streamed] == [e["token"] for e in whole["choices"][0]["logprobs"]["content"]]
    assert all(len(entry["top_logprobs"]) == 2 for entry in streamed)


def test_without_stream_options_no_usage_is_sent(live: Running) -> None:
    assert all("usage" not in chunk for chunk in events(live, "/v1/chat/completions", messages=CHAT))


def test_several_answers(live: Running) -> None:
    found = chat(live, n=3, temperature=1.0, seed=-7, ignore_eos=True)
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2]
    assert found["usage"]["completion_tokens"] == 24
    assert chat(live, n=3, temperature=1.0, seed=-7, ignore_eos=True)["choices"] == found["choices"]
    chunks = events(live, "/v1/chat/completions", messages=CHAT, n=2, temperature=1.0, ignore_eos=True)
    ends = [c["choices"][0]["index"] for c in chunks if c["choices"][0]["finish_reason"]]
    assert ends == [0, 1]


def test_both_names_of_max_tokens_are_known_and_none_means_what_fits(live: Running) -> None:
    found = chat(live, max_tokens=None, max_completion_tokens=3, ignore_eos=True)
    assert found["usage"]["completion_tokens"] == 3
    long = chat(live, max_tokens=None, ignore_eos=True)
    assert long["usage"]["completion_tokens"] == 1024


def test_stop_strings(live: Running) -> None:
    text = chat(live, temperature=0, ignore_eos=True)["choices"][0]["message"]["content"]
    stop = text[3:5]
    found = chat(live, temperature=0, ignore_eos=True, stop=stop)["choices"][0]
    assert found["message"]["content"] == text[: text.index(stop)]
    assert found["finish_reason"] == "stop"


@pytest.mark.parametrize(
    "wanted",
    [
        {"response_format": {"type": "json_object"}},
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "n", "schema": {"type": "object", "properties": {"a": {"enum": ["x"]}}}},
            }
        },
        {"structured_outputs": {"json": {"type": "object"}}},
        {"structured_outputs": {"json": '{"type": "object"}'}},
        {"structured_outputs": {"json_object": True}},
    ],
)
def test_formats_hold_the_answer(live: Running, wanted: dict[str, Any]) -> None:
    found = chat(live, max_tokens=400, temperature=1.0, seed=1, **wanted)["choices"][0]
    assert found["finish_reason"] in ("stop", "length")
    assert found["message"]["content"].startswith("{")
    if found["finish_reason"] == "stop":
        assert isinstance(json.loads(found["message"]["content"]), dict)


def test_choices_and_regular_expressions(live: Running) -> None:
    found = chat(live, structured_outputs={"choice": ["red", "green"]})
    assert found["choices"][0]["message"]["content"] in ("red", "green")
    found = chat(live, structured_outputs={"regex": "[ab]{3}"})
    assert set(found["choices"][0]["message"]["content"]) <= {"a", "b"}


def test_an_adapter_is_a_model_name(live: Running) -> None:
    messages = [{"role": "user", "content": "an adapter of its own"}]
    base = chat(live, temperature=0, messages=messages)
    found = chat(live, model="jailbreak", max_tokens=None, messages=messages)
    assert found["model"] == "jailbreak"
    assert found["choices"][0]["message"]["content"] in ('"yes"', '"no"')
    assert found["usage"]["prompt_tokens_details"]["cached_tokens"] == 29, "the base model's prompt is reused"
    by_name = {"adapter_name": "jailbreak"}
    named = chat(live, chat_template_kwargs=by_name, max_tokens=40, messages=messages)
    assert named["choices"][0]["message"] == found["choices"][0]["message"]
    assert base["model"] == "tiny"
    free = chat(live, model="jailbreak", response_format={"type": "text"}, temperature=1.0, ignore_eos=True)
    assert free["usage"]["completion_tokens"] == 8, "held to its contract only where the request leaves it open"
    error = chat(live, 400, model="jailbreak", chat_template_kwargs={"adapter_name": "certainty"})["error"]
    assert "one adapter per request" in error["message"]


def test_an_invocation_in_the_last_message_calls_the_adapter_there(live: Running) -> None:
    called = [*CHAT, {"role": "user", "content": "<|im_start|>jailbreak\n"}]
    tokens = {}
    for name, messages in (("own", CHAT), ("sent", called)):
        body = {"model": "jailbreak", "messages": messages}
        tokens[name] = live.client.post("/tokenize", json=body).json()["tokens"]
    assert len(tokens["sent"]) > len(tokens["own"])
    invocation = live.client.post("/tokenize", json={"prompt": "<|im_start|>jailbreak\n"}).json()["tokens"]
    assert tokens["own"][-len(invocation) :] == invocation
    assert tokens["sent"][-len(invocation) :] != invocation, "nothing was appended"
    quoted = [called[1], {"role": "assistant", "content": "yes"}, *CHAT]
    found = live.client.post("/tokenize", json={"model": "jailbreak", "messages": quoted}).json()["tokens"]
    assert found[-len(invocation) :] == invocation, "one further up is a quotation"


def test_documents_stay_in_the_turn_before_an_instruction(live: Running) -> None:
    documents = [{"text": "Paris is in France.", "doc_id": "1"}]
    history = [*CHAT, {"role": "assistant", "content": "hi"}]
    plain = live.client.post(
        "/tokenize", json={"messages": history, "documents": documents, "add_generation_prompt": False}
    )
    asked = [*history, {"role": "user", "content": "Requirement: be short"}]
    body = {"messages": asked, "documents": documents, "model": "requirement_check"}
    tokens = live.client.post("/tokenize", json=body).json()["tokens"]
    before = plain.json()["tokens"]
    assert tokens[: len(before)] == before


def test_content_parts_developers_and_null_content(live: Running) -> None:
    parts = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hello"}]},
    ]
    plain = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    one, other = (live.client.post("/tokenize", json={"messages": m}).json()["tokens"] for m in (parts, plain))
    assert one == other
    picture = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    assert "content" in chat(live, 400, messages=picture)["error"]["message"]


def test_text_completions(live: Running) -> None:
    body = {"prompt": "once", "max_tokens": 5, "temperature": 0, "logprobs": 2, "ignore_eos": True}
    found = live.client.post("/v1/completions", json=body).json()
    assert found["object"] == "text_completion"
    (choice,) = found["choices"]
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]).encode()[:4] == choice["text"].encode()[:4]
    assert logprobs["text_offset"][0] == 0
    assert len(logprobs["top_logprobs"]) == 5
    ids = live.client.post("/tokenize", json={"prompt": "once"}).json()["tokens"]
    several = live.client.post("/v1/completions", json={**body, "prompt": [ids, ids]}).json()
    assert [c["text"] for c in several["choices"]] == [choice["text"]] * 2
    chunks = events(live, "/v1/completions", prompt="once", temperature=0, max_tokens=5, ignore_eos=True)
    assert "".join(c["choices"][0]["text"] for c in chunks) == choice["text"]


def test_one_wrong_prompt_of_several_ends_the_others(live: Running) -> None:
    body = {"prompt": [[40, 41, 42]] * 20 + [[999_999]], "max_tokens": 1500, "temperature": 0, "ignore_eos": True}
    assert live.client.post("/v1/completions", json=body).status_code == 400
    asyncio.run(settled(live.engine, seconds=1))
    response = live.client.post("/v1/completions", json={**body, "prompt": ["x"] * 200})
    assert "at most 128" in response.json()["error"]["message"]


def test_the_parts_of_a_character_have_no_bytes_of_their_own(live: Running) -> None:
    found = chat(live, structured_outputs={"choice": ["é", "à"]}, logprobs=True)
    entries = found["choices"][0]["logprobs"]["content"]
    assert [entry["bytes"] for entry in entries if "�" in entry["token"]] == [None] * len(entries)
    plain = chat(live, structured_outputs={"choice": ["a", "b"]}, logprobs=True)["choices"][0]
    assert plain["logprobs"]["content"][0]["bytes"] == list(plain["message"]["content"].encode())


def test_offsets_of_a_stream_go_on_where_its_tokens_stopped(live: Running) -> None:
    body = {"prompt": "once", "temperature": 0, "max_tokens": 20, "ignore_eos": True, "logprobs": 1, "stop": ["zzz"]}
    whole = live.client.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]["text_offset"]
    chunks = [c["choices"][0]["logprobs"] for c in events(live, "/v1/completions", **body)]
    assert [at for found in chunks if found for at in found["text_offset"]] == whole


def test_a_text_without_the_invocation_is_an_error_and_not_the_base_models_answer(live: Running) -> None:
    response = live.client.post("/v1/completions", json={"model": "jailbreak", "prompt": "hello"})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invocation_missing"


@pytest.mark.parametrize(
    ("body", "status", "code", "hint"),
    [
        ({"model": "nobody"}, 404, "model_not_found", "jailbreak"),
        ({"messages": []}, 400, "invalid_request_error", "messages"),
        ({"surprise": 1}, 400, "invalid_request_error", "surprise"),
        ({"temperature": 99}, 400, "invalid_request_error", "temperature"),
        ({"presence_penalty": 1.5}, 400, "invalid_request_error", "presence_penalty"),
        ({"top_logprobs": 3}, 400, "invalid_request_error", "logprobs"),
        ({"stop": [""]}, 400, "invalid_request_error", "stop"),
        ({"max_tokens": 10**6}, 400, "context_length_exceeded", "context"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "invalid_request_error", "tools"),
        ({"chat_template_kwargs": {"tokenize": True}}, 400, "invalid_request_error", "tokenize"),
        ({"structured_outputs": {"regex": "("}}, 400, "invalid_constraint", "regex"),
        ({"structured_outputs": {"json": "{"}}, 400, "invalid_constraint", "JSON"),
        ({"structured_outputs": {}}, 400, "invalid_request_error", "exactly one"),
        ({"response_format": {"type": "json_schema"}}, 400, "invalid_request_error", "json_schema"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "invalid_request_error", "Unicode"),
    ],
)
def test_bad_requests_name_what_is_wrong(
    live: Running, body: dict[str, Any], status: int, code: str, hint: str
) -> None:
    response = live.client.post(
        "/v1/chat/completions",
        content=json.dumps({"messages": CHAT, "max_tokens": 8, **body}),
        headers={"content-type": "application/json"},
    )
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["code"] == code
    assert hint in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b'{"messages": ' + b"9" * 5000 + b"}", b"\xff\xfe"])
def test_what_is_no_json_is_a_bad_request(live: Running, content: bytes) -> None:
    response = live.client.post("/v1/chat/completions", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_request_error"


def test_unknown_paths_and_methods_have_the_same_shape(live: Running) -> None:
    assert live.client.get("/v1/nothing").json()["error"]["code"] == "not_found"
    response = live.client.get("/v1/chat/completions")
    assert response.status_code == 405
    assert response.json()["error"]["code"] == "method_not_allowed"
