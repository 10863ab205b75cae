"""Faults from outside and inside: the request that meets one gets an error, the others finish, the server goes on."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from midstream.server import tracing
from tests.helpers import tiny_llama
from tests.server.running import ADAPTERS, Running, make_engine, running, settled
from tests.tiny import tiny_engine


def body(text: str = "hello there", **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "temperature": 0, "ignore_eos": True, **more}


def test_a_failing_forward_is_one_requests_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine(tiny_llama())
    with running(engine) as server:
        runner = engine._loop._runner
        run = runner.run

        def fail_for_one(step: Any) -> Any:
            if any(segment.branch.job.params.max_tokens == 13 for segment in step.segments):
                raise RuntimeError("out of memory")
            return run(step)

        monkeypatch.setattr(runner, "run", fail_for_one)
        found: dict[int, httpx.Response] = {}

        def send(tokens: int) -> None:
            found[tokens] = httpx.post(f"{server.url}/v1/chat/completions", json=body(max_tokens=tokens), timeout=60)

        threads = [threading.Thread(target=send, args=(tokens,)) for tokens in (12, 13, 14)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {tokens: response.status_code for tokens, response in found.items()} == {12: 200, 13: 500, 14: 200}
        error = found[13].json()["error"]
        assert error["code"] == "forward_failed"
        assert "Traceback" not in found[13].text
        assert server.client.get("/health").status_code == 200


def test_a_bug_in_an_endpoint_shows_no_trace(live: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Any:
        raise KeyError("secret detail")

    monkeypatch.setattr(live.engine, "stats", fail)
    response = live.client.get("/metrics")
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    assert "secret" not in response.text


def test_a_client_that_reads_a_byte_at_a_time_holds_no_kv(live: Running) -> None:
    content = json.dumps(body(stream=True, max_tokens=400)).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with socket.create_connection(live.url.removeprefix("http://").split(":")) as slow:
        slow.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        assert slow.recv(1) == b"H"
        asyncio.run(settled(live.engine))
        assert slow.recv(1) == b"T"
        assert live.client.post("/v1/chat/completions", json=body(max_tokens=3)).status_code == 200


def test_a_client_that_stops_reading_is_dropped(tmp_path: Path) -> None:
    with running(tiny_engine(tiny_llama()), stall_timeout_s=0.5) as server:
        content = json.dumps(body(stream=True, max_tokens=1900, logprobs=True, top_logprobs=20)).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
        with socket.socket() as stuck:
            stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            host, port = server.url.removeprefix("http://").split(":")
            stuck.connect((host, int(port)))
            stuck.sendall(f"{head}{len(content)}\r\n\r\n".encode() + content)
            started = time.monotonic()
            while not sum(server.service.open_requests.values()):
                assert time.monotonic() - started < 20
                time.sleep(0.01)
            while sum(server.service.open_requests.values()):
                assert time.monotonic() - started < 40, "a client that does not read is kept for ever"
                time.sleep(0.05)


def test_clients_that_come_and_go(tmp_path: Path) -> None:
    """A small soak: half of them leave at random moments, the others finish, and all that is left is the cache."""
    engine = make_engine(tmp_path, max_running_sequences=16)
    with running(engine) as server:
        outcomes: Counter[str] = Counter()
        names = ["tiny", *ADAPTERS]
        free = {"response_format": {"type": "text"}}

        async def client(http: httpx.AsyncClient, number: int) -> None:
            rng = random.Random(number)
            for _ in range(4):
                text = f"conversation {rng.randrange(5)} " * 8
                settings = body(text, model=rng.choice(names), stream=True, max_tokens=rng.randrange(1, 60), **free)
                leaves = rng.randrange(1, 20) if rng.random() < 0.5 else None
                async with http.stream("POST", "/v1/chat/completions", json=settings) as response:
                    assert response.status_code == 200
                    seen = 0
                    async for line in response.aiter_lines():
                        seen += 1
                        if seen == leaves:
                            outcomes["left"] += 1
                            break
                        outcomes["finished"] += line == "data: [DONE]"

        async def all_clients() -> None:
            async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
                await asyncio.gather(*(client(http, number) for number in range(40)))

        asyncio.run(all_clients())
        assert outcomes.total() == 160
        assert outcomes["left"] > 40
        asyncio.run(settled(engine))
        assert not any(node.held for node in asyncio.run(engine.cache_nodes(limit=10**6)))
        assert not sum(server.service.open_requests.values())


def test_spans_below_the_callers(live: Running) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    caller = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    live.client.post("/v1/chat/completions", json=body(max_tokens=2), headers={"traceparent": caller})
    live.client.post("/v1/intrinsics/jailbreak", json={"messages": body()["messages"]}, headers={"traceparent": caller})
    spans = [span for span in exporter.get_finished_spans() if span.name.startswith("midstream.")]
    assert len(spans) == 2
    for span, model in zip(spans, ("tiny", "jailbreak"), strict=True):
        assert span.context is not None
        assert f"{span.context.trace_id:032x}" == caller.split("-")[1]
        assert span.attributes is not None
        assert span.attributes["gen_ai.request.model"] == model
        assert span.attributes["gen_ai.usage.input_tokens"] > 0


def test_an_endpoint_for_spans_without_the_exporter_is_said_and_stops_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    monkeypatch.setattr(trace, "get_tracer_provider", object)
    tracing.set_up()
    assert "opentelemetry-exporter-otlp-proto-http" in caplog.text
