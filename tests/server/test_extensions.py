"""vLLM's fields for tokens, and this project's own: token ids, probabilities, times, scores, salts, chats."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from midstream.server.models import _without_path
from midstream.types import Chat, Document, Message
from tests.server.running import Running
from tests.server.test_completions import CHAT, chat, events

IDS = list(range(40, 60))


def text(live: Running, status: int = 200, **body: Any) -> Any:
    response = live.client.post(
        "/v1/completions", json={"prompt": IDS, "max_tokens": 6, "temperature": 0, "ignore_eos": True, **body}
    )
    assert response.status_code == status, response.text
    return response.json()


def tokens(live: Running, **body: Any) -> list[int]:
    found: list[int] = live.client.post("/tokenize", json=body).json()["tokens"]
    return found


def test_token_ids_come_only_where_they_are_asked_for(live: Running) -> None:
    found = text(live, return_token_ids=True)["choices"][0]
    assert found["prompt_token_ids"] == IDS
    assert len(found["token_ids"]) == 6
    spelled = live.client.post("/detokenize", json={"tokens": found["token_ids"]}).json()["prompt"]
    assert spelled == found["text"]
    plain = text(live)["choices"][0]
    assert not {"token_ids", "prompt_token_ids"} & plain.keys()
    talk = chat(live, temperature=0, return_token_ids=True, ignore_eos=True)
    assert talk["prompt_token_ids"] == tokens(live, messages=CHAT)
    assert len(talk["choices"][0]["token_ids"]) == 8


def test_a_streams_chunks_have_their_own_and_the_first_the_prompts(live: Running) -> None:
    whole = text(live, return_token_ids=True)["choices"][0]["token_ids"]
    body = {"prompt": IDS, "max_tokens": 6, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    first, *others = (chunk["choices"][0] for chunk in events(live, "/v1/completions", **body))
    assert first["prompt_token_ids"] == IDS
    assert all("prompt_token_ids" not in chunk for chunk in others)
    assert [token for chunk in (first, *others) for token in chunk.get("token_ids", ())] == whole
    start, *rest = events(live, "/v1/chat/completions", messages=CHAT, return_token_ids=True)
    assert start["prompt_token_ids"] == tokens(live, messages=CHAT)
    assert all("prompt_token_ids" not in chunk for chunk in rest)


def test_tokens_of_logprobs_may_read_as_their_ids(live: Running) -> None:
    body = {"logprobs": 4, "return_token_ids": True}
    plain, ids = (text(live, **body, return_tokens_as_token_ids=show)["choices"][0] for show in (False, True))
    found = ids["logprobs"]
    assert found["tokens"] == [f"token_id:{token}" for token in ids["token_ids"]]
    assert [found["token_texts"][token] for token in found["tokens"]] == plain["logprobs"]["tokens"]
    assert all(len(top) == 4 for top in found["top_logprobs"]), "none is lost where two have the same text"
    assert found["token_logprobs"] == plain["logprobs"]["token_logprobs"]
    assert "token_texts" not in plain["logprobs"]
    talk = chat(live, logprobs=True, top_logprobs=2, return_tokens_as_token_ids=True)["choices"][0]["logprobs"]
    shown = [one["token"] for entry in talk["content"] for one in (entry, *entry["top_logprobs"])]
    assert all(re.fullmatch(r"token_id:\d+", token) for token in shown)
    assert set(shown) == talk["token_texts"].keys()


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_answers_tell_probabilities_activation_and_times(live: Running, path: str) -> None:
    wanted = {"structured_outputs": {"choice": ["red", "green"]}}
    ask = chat if "chat" in path else text
    found = ask(live, **wanted)
    (choice,) = found["choices"]
    assert sum(choice["probabilities"].values()) == pytest.approx(1)
    assert choice["probabilities"].keys() == {"red", "green"}
    assert choice["activation_index"] is None
    assert 0 < found["time_to_first_token_s"] <= found["seconds"]
    assert ask(live)["choices"][0]["probabilities"] is None
    prompt = {"messages": CHAT} if "chat" in path else {"prompt": IDS}
    chunks = events(live, path, stream_options={"include_usage": True}, **prompt, **wanted)
    ends = [chunk["choices"][0] for chunk in chunks if chunk["choices"] and chunk["choices"][0]["finish_reason"]]
    assert [end["probabilities"].keys() for end in ends] == [{"red", "green"}]
    assert chunks[-1]["seconds"] > 0


def test_the_activation_index_of_an_adapter_and_of_several_prompts(live: Running) -> None:
    called = tokens(live, model="jailbreak", messages=CHAT)
    invocation = tokens(live, prompt="<|im_start|>jailbreak\n")
    found = chat(live, model="jailbreak", max_tokens=None)["choices"][0]
    assert found["activation_index"] == len(called) - len(invocation)
    several = text(live, model="jailbreak", prompt=[[40, *invocation], [40, 41, *invocation]])["choices"]
    assert [choice["activation_index"] for choice in several] == [1, 2]
    assert text(live, model="twin")["choices"][0]["activation_index"] == 0


def test_continuations_are_scored(live: Running) -> None:
    body = {"prompt": IDS, "continuations": [[41, 42, 43], [50]]}
    found = live.client.post("/v1/score_continuations", json=body).json()
    assert [len(row) for row in found["logprobs"]] == [3, 1]
    assert all(value < 0 for row in found["logprobs"] for value in row)
    assert found["usage"]["prompt_tokens"] == len(IDS)
    assert found["model"] == "tiny"
    own = text(live, logprobs=1, max_tokens=3, return_token_ids=True)["choices"][0]
    body["continuations"] = [own["token_ids"]]
    found = live.client.post("/v1/score_continuations", json=body).json()
    assert found["logprobs"][0] == pytest.approx(own["logprobs"]["token_logprobs"], abs=1e-4)


@pytest.mark.parametrize(
    ("body", "status", "hint"),
    [
        ({"continuations": []}, 400, "continuations"),
        ({"continuations": [[]]}, 400, "continuations"),
        ({"continuations": [[1]] * 1025}, 400, "1024"),
        ({"prompt": []}, 400, "prompt"),
        ({"prompt": [10**9]}, 400, "token id"),
        ({"continuations": [[10**9]]}, 400, "token id"),
        ({"model": "jailbreak"}, 400, "invoked by"),
        ({"model": "nobody"}, 404, "nobody"),
        ({"continuations": [[1] * 5000]}, 400, "context"),
    ],
)
def test_bad_scores_name_what_is_wrong(live: Running, body: dict[str, Any], status: int, hint: str) -> None:
    response = live.client.post("/v1/score_continuations", json={"prompt": IDS, "continuations": [[1]], **body})
    assert response.status_code == status, response.text
    assert hint in response.json()["error"]["message"]


def test_a_salt_keeps_kv_apart(live: Running) -> None:
    def cached(**body: Any) -> int:
        usage = text(live, prompt=list(range(100, 150)), **body)["usage"]
        count: int = usage["prompt_tokens_details"]["cached_tokens"]
        return count

    found = [cached(**body) for body in ({}, {"cache_salt": "s"}, {"cache_salt": "s"}, {"cache_salt": "t"}, {})]
    assert [count > 0 for count in found] == [False, False, True, False, True]
    assert "cache_salt" in text(live, 400, cache_salt="")["error"]["message"]


def test_a_chat_as_the_library_has_it_is_rendered_as_the_engine_does(live: Running) -> None:
    talk = Chat(
        messages=(Message(role="user", content="hi", documents=(Document(text="own"),)),),
        documents=(Document(text="the chat's", title="T"),),
        appended=(Message(role="user", content="judge"),),
        template_arguments={"adapter_name": "jailbreak"},
    )
    for header in (True, False):
        found = tokens(live, chat=talk.model_dump(), add_generation_prompt=header)
        engine = live.engine.chat
        assert tuple(found) == (engine.prompt(talk) if header else engine.history(talk))
    for wrong in ({"chat": talk.model_dump(), "prompt": "x"}, {"chat": talk.model_dump(), "tools": [{}]}, {}):
        assert live.client.post("/tokenize", json=wrong).status_code == 400


def test_the_text_of_a_schema_is_taken_as_it_stands(live: Running) -> None:
    schema = {"enum": ["yes", "no"]}
    as_object = text(live, structured_outputs={"json": schema})["choices"][0]
    as_text = text(live, structured_outputs={"json": json.dumps(schema)})["choices"][0]
    assert as_object["probabilities"].keys() == {'"yes"', '"no"'}
    assert as_text["text"] in ('"yes"', '"no"')
    assert as_text["probabilities"] is None


def test_models_describe_their_adapters_without_the_servers_paths(live: Running) -> None:
    reply = live.client.get("/v1/models")
    infos = {info.name: info for info in live.engine.adapter_infos()}
    for entry in reply.json()["data"][1:]:
        info, adapter = infos[entry["id"]], entry["adapter"]
        assert adapter["contract"] == info.contract
        assert adapter["size_bytes"] == info.size_bytes > 0
        assert adapter["pinned"] is False
        assert adapter["metadata"]["reads"] == info.metadata["reads"]
        assert info.path not in reply.text


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("/home/me/models/base", "base"),
        ("C:\\models\\base", "base"),
        ("org/base", "org/base"),
        ("base", "base"),
        (3, 3),
    ],
)
def test_a_folder_of_the_machine_of_the_training_is_named_alone(value: Any, shown: Any) -> None:
    assert _without_path(value) == shown
