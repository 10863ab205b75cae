"""A server in front of another one: what it says while that one is down, slow, breaks off or is the wrong one."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from midstream.config import ServerConfig
from midstream.engine.engine import AsyncEngine
from midstream.errors import BackendError, EngineStopped, ModelError
from midstream.remote.folders import read_folder
from midstream.server import remote_engine
from midstream.server.app import create_app
from midstream.server.opening import Opened
from midstream.server.remote_engine import RemoteEngine
from midstream.server.run import _serve
from midstream.types import Request, SamplingParams
from tests.remote.vllm_shaped import VllmShaped
from tests.server.running import front_of, make_engine, write_adapters

CHAT = [{"role": "user", "content": "hello there"}]
BODY = {"messages": CHAT, "temperature": 0, "ignore_eos": True, "max_tokens": 8}
FAR = "http://far:8000"


class Link(httpx.AsyncBaseTransport):
    """The way to an application in this process, which may be down, slow, or break off after so many bytes."""

    def __init__(self, there: FastAPI | httpx.MockTransport) -> None:
        self._there = there if isinstance(there, httpx.MockTransport) else httpx.ASGITransport(there)
        self.down = False
        self.slow = False
        self.breaks_after: int | None = None
        self.bodies: list[dict[str, Any]] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if self.down:
            raise httpx.ConnectError("connection refused")
        if request.url.path == "/v1/completions":
            self.bodies.append(json.loads(request.content))
            if self.slow:
                await asyncio.sleep(3600)
        response = await self._there.handle_async_request(request)
        if request.url.path != "/v1/completions" or self.breaks_after is None:
            return response
        content = await response.aread()
        headers = {"content-type": response.headers["content-type"]}
        return httpx.Response(response.status_code, headers=headers, content=_broken(content[: self.breaks_after]))


async def _broken(content: bytes) -> AsyncIterator[bytes]:
    yield content
    raise httpx.ReadError("connection reset")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AsyncEngine]:
    engine = make_engine(tmp_path_factory.mktemp("far"))
    yield engine
    asyncio.run(engine.aclose())


@pytest.fixture
def link(engine: AsyncEngine) -> Link:
    return Link(create_app(engine, ServerConfig(library=False)))


@asynccontextmanager
async def serving(engine: RemoteEngine, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a server over an engine."""
    async with engine:
        app = create_app(engine, ServerConfig(library=False, **settings))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://near", timeout=30) as client:
            yield client


async def status(client: httpx.AsyncClient, expected: int) -> dict[str, Any]:
    """The body of /health once it has that status."""
    for _ in range(300):
        response = await client.get("/health")
        if response.status_code == expected:
            found: dict[str, Any] = response.json()
            return found
        await asyncio.sleep(0.02)
    raise AssertionError(f"health is not {expected}: {response.text}")


async def refused(client: httpx.AsyncClient, expected: int, code: str, **more: Any) -> str:
    response = await client.post("/v1/chat/completions", json={**BODY, **more})
    assert response.status_code == expected, response.text
    error = response.json()["error"]
    assert error["code"] == code
    return str(error["message"])


async def test_a_server_that_is_down_at_the_start_and_comes_up(link: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_engine, "_LOOK_EVERY_S", 0.05)
    link.down = True
    async with serving(front_of(FAR, transport=link)) as client:
        health = await status(client, 503)
        assert health["status"] == "unavailable"
        assert "far:8000" in health["error"]["message"]
        assert "cannot be reached" in await refused(client, 502, "backend_error")
        await refused(client, 502, "backend_error", model="jailbreak")
        tokens = await client.post("/tokenize", json={"prompt": "x"})
        assert tokens.status_code == 502, "how long a prompt may be is not known yet"
        for path in ("/v1/flows", "/", "/openapi.json"):
            assert (await client.get(path)).status_code == 200
        metrics = await client.get("/metrics")
        assert metrics.status_code == 200
        assert "vllm:num_requests_running{" not in metrics.text
        link.down = False
        await status(client, 200)
        assert (await client.post("/v1/chat/completions", json=BODY)).status_code == 200
        assert "vllm:num_requests_running{" in (await client.get("/metrics")).text


async def test_a_server_that_goes_down_later_is_noticed_by_the_first_request_that_fails(link: Link) -> None:
    async with serving(front_of(FAR, transport=link)) as client:
        await status(client, 200)
        link.down = True
        assert "cannot be reached" in await refused(client, 502, "backend_error")
        await status(client, 503)
        names = [model["id"] for model in (await client.get("/v1/models")).json()["data"]]
        assert "jailbreak" in names, "what it served is still known"
        tokens = await client.post("/tokenize", json={"messages": CHAT, "model": "jailbreak"})
        assert tokens.status_code == 200
        error = (await client.post("/v1/intrinsics", json={"names": ["jailbreak"], "messages": CHAT})).json()
        assert error["data"][0]["error"]["code"] == "backend_error"


async def test_a_server_that_breaks_off(link: Link) -> None:
    async with serving(front_of(FAR, transport=link)) as client:
        whole = (await client.post("/v1/chat/completions", json={**BODY, "stream": True})).text
        assert "error" not in whole
        link.breaks_after = 900
        broken = (await client.post("/v1/chat/completions", json={**BODY, "stream": True})).text
        *events, done = [line.removeprefix("data: ") for line in broken.splitlines() if line]
        assert done == "[DONE]"
        assert len(events) > 1, "what came is passed on"
        assert json.loads(events[-1])["error"]["code"] == "backend_error"
        link.breaks_after = 10
        for stream in (False, True):
            assert "broke off" in await refused(client, 502, "backend_error", stream=stream)


async def test_a_slow_server_is_a_deadline(link: Link) -> None:
    link.slow = True
    async with serving(front_of(FAR, transport=link), request_timeout_s=0.3) as client:
        await refused(client, 504, "deadline_exceeded")
        await status(client, 200)


async def test_closing_ends_what_runs_and_what_was_started_for_it(link: Link) -> None:
    link.slow = True
    engine = front_of(FAR, transport=link)
    closed: list[str] = []

    async def closing() -> None:
        closed.append("child")

    engine._closing = closing
    async with engine:
        request = Request(prompt=(40, 41), params=SamplingParams(max_tokens=3))
        running = asyncio.create_task(engine.complete(request))
        streaming = asyncio.create_task(anext(engine.stream(request)))
        while len(link.bodies) < 2:
            await asyncio.sleep(0.01)
        await engine.aclose()
        for task in (running, streaming):
            with pytest.raises(EngineStopped):
                await task
        with pytest.raises(EngineStopped):
            await engine.complete(request)
        assert isinstance(engine.fault, EngineStopped)
    assert closed == ["child"]


async def test_keys_are_kept_apart_there_too(link: Link) -> None:
    async with serving(front_of(FAR, transport=link), api_keys=["one", "two"], isolate_cache=True) as client:
        for key in ("one", "two"):
            headers = {"Authorization": f"Bearer {key}"}
            found = (await client.post("/v1/chat/completions", json=BODY, headers=headers)).json()
            assert found["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert len({body["cache_salt"] for body in link.bodies}) == 2


@pytest.mark.parametrize("differs", ["tokenizer", "chat template"])
async def test_another_model_there_is_refused(engine: AsyncEngine, differs: str) -> None:
    there = VllmShaped(engine)

    async def answer(request: httpx.Request) -> httpx.Response:
        response = await there.transport.handle_async_request(request)
        if request.url.path == "/tokenize" and ("prompt" in json.loads(request.content)) == (differs == "tokenizer"):
            return httpx.Response(200, json={"tokens": [1, 2, 3]})
        return response

    def other() -> RemoteEngine:
        return front_of(FAR, transport=httpx.MockTransport(answer))

    async with serving(other()) as client:
        assert differs in (await status(client, 503))["error"]["message"]
        assert "serves tiny" in await refused(client, 502, "backend_error")
    with pytest.raises(ModelError, match=differs):
        await _serve(Opened(other()), ServerConfig(library=False, port=0))


async def test_a_server_that_does_not_tokenize_is_taken_at_its_word(
    engine: AsyncEngine, caplog: pytest.LogCaptureFixture
) -> None:
    there = VllmShaped(engine)

    async def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/tokenize":
            return httpx.Response(404, json={"detail": "Not Found"})
        return await there.transport.handle_async_request(request)

    async with serving(front_of(FAR, transport=httpx.MockTransport(answer))) as client:
        assert "has no /tokenize" in caplog.text
        assert (await client.post("/v1/chat/completions", json=BODY)).status_code == 200


async def test_an_adapter_that_one_side_does_not_have(
    engine: AsyncEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    infos = [read_folder(path, name=name) for name, path in write_adapters(tmp_path).items() if name != "certainty"]
    extra = read_folder(tmp_path / "certainty", name="only_here")
    link = Link(VllmShaped(engine).transport)
    async with serving(front_of(FAR, transport=link, adapters=[*infos, extra])) as client:
        assert "does not serve adapters whose folders are here: only_here" in caplog.text
        assert "whose folders are not here, so that they cannot be called: certainty" in caplog.text
        for name, reason in (("only_here", "load it there"), ("certainty", "give its PEFT folder")):
            assert reason in await refused(client, 404, "adapter_not_found", model=name)
            call = await client.post(f"/v1/intrinsics/{name}", json={"messages": CHAT})
            assert call.status_code == 404
            assert reason in call.json()["error"]["message"]
        assert "there are: tiny, answerability" in await refused(client, 404, "model_not_found", model="nobody")
        listed = [model["id"] for model in (await client.get("/v1/models")).json()["data"]]
        assert listed == ["tiny", "answerability", "jailbreak", "requirement_check", "twin"]


async def test_a_flow_goes_the_same_way_as_on_the_engine(engine: AsyncEngine, link: Link) -> None:
    app = create_app(engine, ServerConfig(library=False))
    own = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://own")
    async with own, serving(front_of(FAR, transport=link)) as client:
        body = {
            "messages": CHAT,
            "requirements": ["be short"],
            "settings": {"guard": 1.0, "unmet": "flag", "params": {"max_tokens": 8, "temperature": 0.7}},
            "seed": 3,
        }
        for stream in (False, True):
            found, expected = [
                _timeless((await each.post("/v1/flows/guarded", json={**body, "stream": stream})).text)
                for each in (client, own)
            ]
            assert "met" in found
            assert found == expected


def _timeless(text: str) -> str:
    """Without what differs between two runs: times, which tokens were cached, the last digits of probabilities."""
    text = re.sub(r'"(\w*seconds|\w+_tokens|forwards|tokens_spent)":[\d.e-]+', "", text)
    return re.sub(r"(\d\.\d{4})\d+", r"\1", text)


async def test_in_front_of_a_server_without_our_extensions(engine: AsyncEngine, tmp_path: Path) -> None:
    """vLLM, which tells nothing of its adapters: contracts and invocations are those of the folders here."""
    infos = [read_folder(path, name=name) for name, path in write_adapters(tmp_path).items()]
    link = Link(VllmShaped(engine, details=True).transport)
    own = httpx.AsyncClient(
        transport=httpx.ASGITransport(create_app(engine, ServerConfig(library=False))), base_url="http://own"
    )
    async with own, serving(front_of(FAR, transport=link, adapters=infos)) as client:
        messages = [*CHAT, {"role": "assistant", "content": "hi"}]
        names = ["jailbreak", "answerability", "certainty", "requirement_check"]
        body = {"names": names, "messages": messages, "arguments": {"requirement_check": {"requirement": "short"}}}
        found, expected = [(await each.post("/v1/intrinsics", json=body)).json()["data"] for each in (client, own)]
        for key in ("intrinsic", "result", "activation_index"):
            assert [one[key] for one in found] == [one[key] for one in expected]
        for path, more in (("/v1/chat/completions", {"logprobs": True, "top_logprobs": 2}), ("/v1/completions", {})):
            body = {**BODY, **more} if "chat" in path else {"prompt": "abc", "max_tokens": 5, "temperature": 0}
            found, expected = [(await each.post(path, json=body)).json()["choices"] for each in (client, own)]
            assert found == expected
        missing = await client.post("/v1/completions", json={"model": "jailbreak", "prompt": "abc"})
        assert missing.json()["error"]["code"] == "invocation_missing"


async def test_adapters_are_loaded_there(engine: AsyncEngine, tmp_path: Path) -> None:
    shelf = tmp_path / "shelf"
    write_adapters(shelf)
    settings = {"admin_key": "boss", "adapter_dir": shelf}
    link = Link(create_app(engine, ServerConfig(library=False, **settings)))
    async with serving(front_of(FAR, transport=link, api_key="boss"), **settings) as client:
        client.headers["Authorization"] = "Bearer boss"
        body = {"lora_name": "mine", "lora_path": "jailbreak"}
        assert (await client.post("/v1/load_lora_adapter", json=body)).status_code == 200
        assert engine.adapter("mine") is not None
        called = await client.post("/v1/intrinsics/mine", json={"messages": CHAT})
        assert called.json()["result"] in ("yes", "no")
        again = await client.post("/v1/load_lora_adapter", json={**body, "load_inplace": True})
        assert again.status_code == 200
        for expected in (200, 404):
            answer = await client.post("/v1/unload_lora_adapter", json={"lora_name": "mine"})
            assert answer.status_code == expected
            assert engine.adapter("mine") is None
    plain = Link(VllmShaped(engine).transport)
    async with serving(front_of(FAR, transport=plain), **settings) as client:
        client.headers["Authorization"] = "Bearer boss"
        answer = await client.post("/v1/load_lora_adapter", json=body)
        assert answer.status_code == 501
        assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" in answer.json()["error"]["message"]


async def test_the_cache_of_another_server_is_not_shown(link: Link) -> None:
    async with serving(front_of(FAR, transport=link)) as client:
        answer = await client.get("/v1/cache")
        assert answer.status_code == 501
        assert answer.json()["error"]["code"] == "not_supported"


async def test_a_server_that_turns_this_one_away_does_not_turn_its_callers_away(engine: AsyncEngine) -> None:
    link = Link(create_app(engine, ServerConfig(library=False, api_keys=["right"])))
    async with serving(front_of(FAR, transport=link, api_key="wrong")) as client:
        assert "--backend-key" in (await status(client, 503))["error"]["message"]
        assert "--backend-key" in await refused(client, 502, "backend_error")
    async with serving(front_of(FAR, transport=link, api_key="right"), api_keys=["mine"]) as client:
        await refused(client, 401, "invalid_api_key")
        client.headers["Authorization"] = "Bearer mine"
        assert (await client.post("/v1/chat/completions", json=BODY)).status_code == 200


async def test_nothing_is_known_before_the_server_was_asked(link: Link) -> None:
    engine = front_of(FAR, transport=link)
    with pytest.raises(BackendError, match="not been asked"):
        engine.adapter_infos()
    await engine.aclose()
