"""vLLM's OpenAI server with the plugin: errors, usage, counters, and adapters loaded while others are served."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from midstream.errors import AdapterFormatError, InvocationError
from midstream.remote.faults import error_of_response
from prompts import LIBRARY, conversations, invocation
from serving import Vllm, edited

BLOCK = 32
QUESTION = [{"role": "user", "content": "Which river flows through Bern, and how long is it?"}]


@pytest.fixture(scope="module")
def server(vllm: Vllm, model_folder: str) -> Iterator[httpx.Client]:
    flags = ["--model", model_folder, "--served-model-name", "base", "--dtype", "float32", "--enable-lora"]
    flags += ["--max-loras", "2", "--max-lora-rank", "16", "--block-size", str(BLOCK), "--max-model-len", "1024"]
    flags += ["--enable-prompt-tokens-details", "--lora-modules", f"certainty={LIBRARY / 'certainty'}"]
    with vllm.server(*flags) as client:
        yield client


def complete(server: httpx.Client, model: str, prompt: list[int], **fields: Any) -> dict[str, Any]:
    """A greedy completion of token ids."""
    body = {"model": model, "prompt": prompt, "max_tokens": 6, "temperature": 0, "return_token_ids": True, **fields}
    response = server.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def load(server: httpx.Client, name: str, folder: Path, **fields: Any) -> httpx.Response:
    return server.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(folder), **fields})


def tokens(found: dict[str, Any]) -> list[int]:
    return list(found["choices"][0]["token_ids"])


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/chat/completions", {"messages": QUESTION}),
        ("/v1/chat/completions", {"messages": QUESTION, "stream": True}),
        ("/v1/completions", {"prompt": "Which river?"}),
        ("/v1/completions", {"prompt": "Which river?", "stream": True, "n": 2}),
        ("/v1/responses", {"input": "Which river?"}),
    ],
)
def test_a_missing_invocation_is_400_with_our_code_while_others_are_served(
    server: httpx.Client, tokenizer: Any, path: str, fields: dict[str, Any]
) -> None:
    prompt = conversations(tokenizer)[0]
    with ThreadPoolExecutor() as pool:
        others = [
            pool.submit(complete, server, "base", prompt, max_tokens=24, ignore_eos=True),
            pool.submit(
                complete, server, "certainty", prompt + invocation("certainty"), max_tokens=24, ignore_eos=True
            ),
        ]
        refused = server.post(path, json={"model": "certainty", **fields})
        answers = [other.result() for other in others]
    assert refused.status_code == 400, refused.text
    error = refused.json()["error"]
    assert error["code"] == InvocationError.code
    assert "adapter certainty is invoked by [1, 33622, 198] ('<|im_start|>certainty\\n')" in error["message"]
    assert isinstance(error_of_response("", refused.status_code, refused.content), InvocationError)
    assert [answer["usage"]["completion_tokens"] for answer in answers] == [24, 24]


def test_a_stream_of_a_well_invoked_adapter_is_the_same_answer(server: httpx.Client, tokenizer: Any) -> None:
    prompt = conversations(tokenizer)[1] + invocation("certainty")
    whole = complete(server, "certainty", prompt)["choices"][0]["text"]
    body = {"model": "certainty", "prompt": prompt, "max_tokens": 6, "temperature": 0, "stream": True}
    lines = server.post("/v1/completions", json=body).text.splitlines()
    pieces = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert "".join(piece["choices"][0]["text"] for piece in pieces if piece["choices"]) == whole


def test_usage_and_counters_tell_what_came_from_the_cache(server: httpx.Client, tokenizer: Any) -> None:
    prompt = conversations(tokenizer)[9]
    before = counters(server)
    complete(server, "base", prompt)
    found = complete(server, "certainty", prompt + invocation("certainty"))
    cached = len(prompt) // BLOCK * BLOCK
    assert found["usage"]["prompt_tokens_details"]["cached_tokens"] == cached
    grown = {key: value - before.get(key, 0) for key, value in counters(server).items()}
    assert grown["prompt_tokens", "", "base"] == len(prompt)
    assert grown["prompt_tokens", "certainty", "base"] == len(prompt)
    assert grown["prompt_tokens", "certainty", "adapter"] == len(invocation("certainty"))
    assert grown["cached_prompt_tokens", "certainty", "base"] == cached
    assert grown.get(("cached_prompt_tokens", "certainty", "adapter"), 0) == 0


def test_a_reload_under_the_same_name_serves_the_new_weights(
    server: httpx.Client, tokenizer: Any, tmp_path: Path
) -> None:
    folder = edited(LIBRARY / "certainty", tmp_path / "mine", 1)
    prompt = [*conversations(tokenizer)[9], *invocation("certainty"), *range(300, 370)]
    assert load(server, "mine", folder).status_code == 200
    assert tokens(complete(server, "mine", prompt)) == tokens(complete(server, "certainty", prompt))

    edited(LIBRARY / "certainty", folder, 8)
    assert load(server, "mine", folder).status_code == 400  # it is loaded already
    assert load(server, "mine", folder, load_inplace=True).status_code == 200
    # The same weights under another name, read by nobody before: what no cache can have mixed up.
    fresh = edited(LIBRARY / "certainty", tmp_path / "fresh", 8)
    assert load(server, "fresh", fresh).status_code == 200
    new = complete(server, "mine", prompt)
    assert new["usage"]["prompt_tokens_details"]["cached_tokens"] == (len(prompt) - 73) // BLOCK * BLOCK
    assert tokens(new) != tokens(complete(server, "certainty", prompt))
    assert tokens(new) == tokens(complete(server, "fresh", prompt, cache_salt="apart"))


def test_a_broken_folder_is_refused_and_what_was_loaded_stays(
    server: httpx.Client, tokenizer: Any, tmp_path: Path
) -> None:
    folder = edited(LIBRARY / "certainty", tmp_path / "broken", 1)
    prompt = conversations(tokenizer)[2] + invocation("certainty")
    assert load(server, "broken", folder).status_code == 200
    answer = tokens(complete(server, "broken", prompt))

    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": True, "bias": "all"}))
    refused = load(server, "broken", folder, load_inplace=True)
    assert refused.status_code == 400, refused.text
    error = refused.json()["error"]
    assert error["code"] == AdapterFormatError.code
    assert "use_dora" in error["message"]
    assert "bias" in error["message"]
    shutil.rmtree(folder)  # the engine does not need it any more
    assert tokens(complete(server, "broken", prompt)) == answer


def counters(server: httpx.Client) -> dict[tuple[str, str, str], float]:
    """Our counters in /metrics, by name, adapter and owner."""
    pattern = r'^midstream:(\w+)_total\{adapter="(.*?)",owner="(.*?)"\} (\S+)$'
    found = re.findall(pattern, server.get("/metrics").text, flags=re.MULTILINE)
    return {(name, adapter, owner): float(value) for name, adapter, owner, value in found}
