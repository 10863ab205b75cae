"""Keys, limits, adapters at run time, metrics, logs, and what is open to whom."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from midstream.models.chat import ChatTokenizer
from midstream.server import logs
from tests.helpers import make_adapter_folder, tiny_llama
from tests.server.running import Running, make_engine, running
from tests.tiny import tiny_chat, tiny_engine

CHAT = {"messages": [{"role": "user", "content": "hello there, how are you?"}], "temperature": 0, "ignore_eos": True}


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Running]:
    """Two keys, an admin key, an adapter folder, isolation, and small limits."""
    (tmp_path / "shelf").mkdir()
    with running(
        make_engine(tmp_path / "start"),
        api_keys=["one", "two"],
        admin_key="boss",
        adapter_dir=tmp_path / "shelf",
        isolate_cache=True,
        max_body_kib=16,
        max_streams_per_key=2,
        stall_timeout_s=1.0,
        max_adapter_mib=1,
    ) as server:
        yield server


def as_key(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def cached(response: httpx.Response) -> int:
    return response.json()["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_keys(guarded: Running) -> None:
    assert guarded.client.get("/health", headers={"Authorization": "none"}).status_code == 200
    for key in ("three", "on", "onetwo"):
        response = guarded.client.get("/v1/models", headers=as_key(key))
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
    assert guarded.client.get("/v1/models", headers=as_key("two")).status_code == 200
    assert guarded.client.post("/tokenize", json={"prompt": "x"}, headers=as_key("no")).status_code == 401


def test_isolation_by_key_and_sharing_without_it(guarded: Running, live: Running) -> None:
    first = guarded.client.post("/v1/chat/completions", json={**CHAT, "max_tokens": 2}, headers=as_key("one"))
    assert cached(first) == 0
    other = guarded.client.post("/v1/chat/completions", json={**CHAT, "max_tokens": 2}, headers=as_key("two"))
    assert cached(other) == 0, "nothing of another key's is reused"
    assert other.json()["choices"] == first.json()["choices"]
    again = guarded.client.post("/v1/chat/completions", json={**CHAT, "max_tokens": 2}, headers=as_key("two"))
    assert cached(again) > 0
    fresh = {**CHAT, "max_tokens": 2, "messages": [{"role": "user", "content": "only here"}]}
    live.client.post("/v1/chat/completions", json=fresh)
    assert cached(live.client.post("/v1/chat/completions", json=fresh)) > 0
    mine, all_nodes = (guarded.client.get("/v1/cache", headers=as_key(key)).json()["nodes"] for key in ("one", "two"))
    assert mine
    assert all_nodes
    assert guarded.client.get("/v1/cache", headers=as_key("boss")).json()["nodes"] == []
    for key in ("one", "boss"):
        found = guarded.client.get("/v1/cache", headers=as_key(key)).json()
        counts = [found[name] for name in ("prefix_cache_queries", "prefix_cache_hits", "hit_rate")]
        assert counts == [None] * 3, "they are of all keys"


def test_an_intrinsic_call_is_isolated_too(guarded: Running) -> None:
    body = {"messages": CHAT["messages"]}
    for key in ("one", "two"):
        found = guarded.client.post("/v1/intrinsics/jailbreak", json=body, headers=as_key(key))
        assert cached(found) == 0


def test_adapters_at_run_time(guarded: Running, tmp_path: Path) -> None:
    folder = make_adapter_folder(tiny_llama(), tmp_path / "shelf" / "new", seed=3, invocation=tiny_chat().encode("<n>"))
    body = {"lora_name": "new", "lora_path": "new"}

    def load(key: str = "boss", **more: Any) -> httpx.Response:
        return guarded.client.post("/v1/load_lora_adapter", json={**body, **more}, headers=as_key(key))

    assert load(key="one").status_code == 403
    assert load().status_code == 200
    assert "loaded already" in load().json()["error"]["message"]
    assert load(load_inplace=True).status_code == 200
    assert load(lora_name="tiny").status_code == 400
    assert load(lora_name="other", lora_path=str(folder)).status_code == 200, "an absolute path below the folder"
    names = [model["id"] for model in guarded.client.get("/v1/models").json()["data"]]
    assert names[0] == "tiny"
    assert {"new", "other", "jailbreak"} <= set(names)
    shutil.rmtree(folder)
    prompt = {"model": "new", "prompt": "x<n>", "max_tokens": 3}
    assert guarded.client.post("/v1/completions", json=prompt).status_code == 200, "its folder is no longer needed"
    assert guarded.client.post("/v1/unload_lora_adapter", json={"lora_name": "new"}).status_code == 403
    boss = as_key("boss")
    assert guarded.client.post("/v1/unload_lora_adapter", json={"lora_name": "new"}, headers=boss).status_code == 200
    assert guarded.client.post("/v1/unload_lora_adapter", json={"lora_name": "new"}, headers=boss).status_code == 404
    assert guarded.client.post("/v1/completions", json=prompt).status_code == 404


def test_adapters_come_from_their_folder_only(guarded: Running, tmp_path: Path) -> None:
    shelf, outside = tmp_path / "shelf", make_adapter_folder(tiny_llama(), tmp_path / "outside", seed=3)
    (shelf / "link").symlink_to(outside)
    inner = shelf / "inner"
    inner.mkdir()
    shutil.copy(outside / "adapter_config.json", inner)
    (inner / "adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
    large = shutil.copytree(outside, shelf / "large")
    (large / "more.bin").write_bytes(bytes(2 * 1024**2))
    pickled = shelf / "pickled"
    pickled.mkdir()
    shutil.copy(outside / "adapter_config.json", pickled)
    (pickled / "adapter_model.bin").write_bytes(b"x")
    expected = {
        "../outside": 403,
        str(outside): 403,
        "link": 403,
        "inner": 403,
        "large": 400,
        "missing": 400,
        "pickled": 400,
        "a\0b": 400,
        "x" * 4000: 400,
    }
    for path, status in expected.items():
        body = {"lora_name": "bad", "lora_path": path}
        response = guarded.client.post("/v1/load_lora_adapter", json=body, headers=as_key("boss"))
        assert response.status_code == status, (path, response.text)
    assert (
        "safetensors"
        in guarded.client.post(
            "/v1/load_lora_adapter", json={"lora_name": "bad", "lora_path": "pickled"}, headers=as_key("boss")
        ).text
    )


def test_without_an_admin_key_nobody_changes_adapters(live: Running) -> None:
    response = live.client.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "x"})
    assert response.status_code == 403
    assert "--admin-key" in response.json()["error"]["message"]


def test_large_and_slow_bodies(guarded: Running) -> None:
    big = {"messages": [{"role": "user", "content": "x" * 20_000}]}
    response = guarded.client.post("/v1/chat/completions", json=big)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "body_too_large"

    def chunks() -> Iterator[bytes]:
        for _ in range(20):
            yield b"x" * 1024

    assert guarded.client.post("/v1/chat/completions", content=chunks()).status_code == 413
    with socket.create_connection(guarded.url.removeprefix("http://").split(":")) as slow:
        slow.sendall(b"POST /tokenize HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer one\r\nContent-Length: 10\r\n\r\n{")
        slow.settimeout(10)
        assert b"408" in slow.recv(4096).split(b"\r\n")[0]
    assert guarded.client.get("/v1/models").status_code == 200


def test_a_key_has_so_many_requests_open_at_a_time(guarded: Running) -> None:
    body = {**CHAT, "max_tokens": 1500, "stream": True}
    with (
        guarded.client.stream("POST", "/v1/chat/completions", json=body) as a,
        guarded.client.stream("POST", "/v1/chat/completions", json=body) as b,
    ):
        assert (a.status_code, b.status_code) == (200, 200)
        refused = guarded.client.post("/v1/chat/completions", json={**CHAT, "max_tokens": 2})
        assert refused.status_code == 429
        assert refused.headers["retry-after"]
        assert refused.json()["error"]["code"] == "too_many_streams"
        assert guarded.client.get("/v1/models", headers=as_key("two")).status_code == 200
    for _ in range(200):
        if guarded.client.get("/v1/models").status_code == 200:
            break
        time.sleep(0.02)
    else:
        raise AssertionError("closed streams are still counted")


def test_a_full_queue_is_429_and_a_deadline_504(tmp_path: Path) -> None:
    engine = tiny_engine(tiny_llama(), max_running_sequences=1, max_queued_requests=1)
    with running(engine, request_timeout_s=0.6) as server:
        statuses: list[int] = []

        def send() -> None:
            response = httpx.post(f"{server.url}/v1/chat/completions", json={**CHAT, "max_tokens": 1900}, timeout=30)
            statuses.append(response.status_code)
            if response.status_code == 429:
                assert response.headers["retry-after"]
                assert response.json()["error"]["code"] == "overloaded"

        threads = [threading.Thread(target=send) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(statuses) <= {429, 504, 200}
        assert statuses.count(429) >= 1
        assert statuses.count(504) >= 1


def test_a_client_that_leaves_frees_its_kv(live: Running) -> None:
    with live.client.stream(
        "POST", "/v1/chat/completions", json={**CHAT, "max_tokens": 1900, "stream": True}
    ) as response:
        next(response.iter_lines())
    with pytest.raises(httpx.ReadTimeout):
        live.client.post("/v1/chat/completions", json={**CHAT, "max_tokens": 1900}, timeout=0.05)
    started = time.monotonic()
    while asyncio.run(live.engine.stats()).running:
        assert time.monotonic() - started < 2, "cancelled requests still run"
        time.sleep(0.01)


def test_metrics_count_reuse_by_owner(live: Running) -> None:
    def read() -> dict[tuple[str, ...], float]:
        families = text_string_to_metric_families(live.client.get("/metrics").text)
        return {
            (sample.name, sample.labels.get("owner", "")): sample.value
            for family in families
            for sample in family.samples
        }

    before = read()
    messages = [{"role": "user", "content": "counted once"}]
    usage = live.client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 3}).json()["usage"]
    call = live.client.post("/v1/intrinsics/jailbreak", json={"messages": messages}).json()["usage"]
    after = read()

    def grown(name: str, owner: str = "") -> float:
        return after[name, owner] - before.get((name, owner), 0)

    assert grown("vllm:prefix_cache_queries_total") == usage["prompt_tokens"] + call["prompt_tokens"]
    hits = [u["prompt_tokens_details"]["cached_tokens"] for u in (usage, call)]
    assert grown("vllm:prefix_cache_hits_total") == sum(hits)
    assert grown("midstream:reused_tokens_total", "jailbreak") == hits[1]
    assert grown("midstream:computed_tokens_total", "base") == usage["computed_tokens"]
    assert grown("vllm:time_to_first_token_seconds_count") == 2
    assert 0 < after["vllm:kv_cache_usage_perc", ""] <= 1
    assert after["vllm:num_requests_running", ""] == 0


def test_the_cache_as_it_is(live: Running) -> None:
    live.client.post("/v1/intrinsics/jailbreak", json={"messages": CHAT["messages"]})
    found = live.client.get("/v1/cache").json()
    ids = [node["id"] for node in found["nodes"]]
    assert len(set(ids)) == len(ids)
    assert all(node["parent"] in {0, *ids[:at]} for at, node in enumerate(found["nodes"])), "parents come first"
    assert {None, "jailbreak"} <= {node["owner"] for node in found["nodes"]}
    assert 0 < found["kv_used_bytes"] <= found["kv_total_bytes"]
    assert 0 < found["hit_rate"] < 1
    assert found["hit_rate"] == found["prefix_cache_hits"] / found["prefix_cache_queries"]


def test_tokens_and_back(live: Running) -> None:
    found = live.client.post("/tokenize", json={"prompt": "héllo", "return_token_strs": True}).json()
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert live.client.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": "héllo"}
    assert live.client.post("/detokenize", json={"tokens": [10**6]}).status_code == 400


def test_tokens_of_an_adapter_that_the_template_arguments_name(live: Running) -> None:
    def tokens(**body: Any) -> list[int]:
        response = live.client.post("/tokenize", json={"messages": CHAT["messages"], **body})
        assert response.status_code == 200, response.text
        return list(response.json()["tokens"])

    called = tokens(chat_template_kwargs={"adapter_name": "jailbreak"})
    assert called == tokens(model="jailbreak") != tokens()
    both = {"model": "certainty", "chat_template_kwargs": {"adapter_name": "jailbreak"}}
    assert live.client.post("/tokenize", json={"messages": CHAT["messages"], **both}).status_code == 400


def test_tokens_and_texts_are_found_beside_the_loop(live: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []

    def watched(method: Any) -> Any:
        def call(self: ChatTokenizer, given: Any) -> Any:
            with contextlib.suppress(RuntimeError):
                asyncio.get_running_loop()
                threads.append(method.__name__)
            return method(self, given)

        return call

    for name in ("token_text", "decode"):
        monkeypatch.setattr(ChatTokenizer, name, watched(getattr(ChatTokenizer, name)))
    found = live.client.post("/tokenize", json={"prompt": "a text of its own", "return_token_strs": True}).json()
    assert live.client.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": "a text of its own"}
    assert threads == [], "called where an event loop runs"


@pytest.mark.parametrize(
    ("path", "body", "hint"),
    [
        ("/tokenize", {"prompt": "x", "add_special_tokens": True}, "add_special_tokens"),
        ("/tokenize", {"prompt": "x", "documents": [{"text": "y"}]}, "documents go with messages"),
        ("/tokenize", {"prompt": "x", "tools": [{}], "chat_template_kwargs": {"a": 1}}, "tools, chat_template_kwargs"),
        (
            "/v1/chat/completions",
            {**CHAT, "response_format": {"type": "json_object", "json_schema": {"schema": {}}}},
            "json_object",
        ),
        ("/v1/chat/completions", {**CHAT, "response_format": {"type": "text", "json_schema": {"schema": {}}}}, "text"),
        ("/v1/chat/completions", {**CHAT, "stream_options": {"include_usage": True}}, "stream_options"),
        ("/v1/completions", {"prompt": "x", "stream": False, "stream_options": {}}, "stream_options"),
        (
            "/v1/chat/completions",
            {**CHAT, "stream": True, "stream_options": {"include_obfuscation": True}},
            "include_obfuscation",
        ),
    ],
)
def test_a_field_that_would_do_nothing_is_refused(live: Running, path: str, body: dict[str, Any], hint: str) -> None:
    response = live.client.post(path, json=body)
    assert response.status_code == 400, response.text
    assert hint in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "more",
    [
        {"max_tokens": 3, "max_completion_tokens": 2},
        {"max_tokens": 2, "response_format": {"type": "text", "json_schema": None}},
        {"max_tokens": 2, "stream": True, "stream_options": {"include_obfuscation": False}},
    ],
)
def test_what_clients_send_without_need_is_taken(live: Running, more: dict[str, Any]) -> None:
    assert live.client.post("/v1/chat/completions", json={**CHAT, **more}).status_code == 200


def logged(caplog: pytest.LogCaptureFixture, text: str) -> list[str]:
    """All lines, once one of them has that text: a line is written when its answer has been sent."""
    for _ in range(200):
        lines = [logs.JsonFormatter().format(record) for record in list(caplog.records)]
        if any(text in line for line in lines):
            return lines
        time.sleep(0.01)
    raise AssertionError(f"{text} was not logged")


def test_request_ids_and_logs_without_text(live: Running, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="midstream.access"):
        response = live.client.post(
            "/v1/chat/completions", json={**CHAT, "max_tokens": 2}, headers={"X-Request-Id": "me-1"}
        )
        lines = logged(caplog, "me-1")
    assert response.headers["x-request-id"] == "me-1"
    fields = next(json.loads(line) for line in lines if "me-1" in line)
    assert fields["path"] == "/v1/chat/completions"
    assert fields["status"] == 200
    assert fields["completion_tokens"] == 2
    assert all("hello" not in line for line in lines)
    assert len(live.client.get("/health", headers={"X-Request-Id": "x" * 500}).headers["x-request-id"]) == 32


def test_logs_with_text_where_asked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with (
        running(tiny_engine(tiny_llama()), log_text=True) as server,
        caplog.at_level(logging.INFO, logger="midstream.access"),
    ):
        server.client.post("/v1/chat/completions", json={**CHAT, "max_tokens": 2})
        logged(caplog, "hello there")


def test_a_full_disk_for_logs_stops_nothing(live: Running) -> None:
    handler = logs.PatientFileHandler("/dev/full")
    logger = logging.getLogger("midstream")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        assert live.client.post("/v1/chat/completions", json={**CHAT, "max_tokens": 2}).status_code == 200
        for _ in range(200):  # the line is written when the answer has been sent
            if handler.lost:
                break
            time.sleep(0.01)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
        handler.close()
    assert handler.lost > 0


def test_every_answer_forbids_foreign_content(live: Running) -> None:
    policy = live.client.get("/health").headers["content-security-policy"]
    assert "default-src 'self'" in policy
