"""Two servers behind the router: a conversation stays on one, and a server that dies costs time, not answers."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from midstream.engine.engine import AsyncEngine
from midstream.remote import RemoteBackend
from midstream.remote.affinity import SESSION_HEADER
from midstream.types import Chat, Completion, Message, Request, SamplingParams
from tests.scale.replicas import Heard, Routed, routed
from tests.server.running import make_engine

TURNS = 2
CONVERSATIONS = [f"{number}. What do you know about the number {number * 37}?" for number in range(6)]
# Long enough that whoever kills a server after its first tokens finds it in the middle of the answer.
PARAMS = SamplingParams(max_tokens=30, ignore_eos=True)
LABEL = SamplingParams(max_tokens=4, ignore_eos=True)


@contextmanager
def pair(folder: Path) -> Iterator[Routed]:
    flags = ["--dtype", "float32"]
    for name in ("jailbreak", "certainty", "twin"):
        flags += ["--adapter", f"{name}={folder / 'adapters' / name}"]
    with routed(folder, *flags) as found:
        yield found


@pytest.fixture(scope="module")
def behind(folder: Path) -> Iterator[Routed]:
    """Two servers that no test may hurt."""
    with pair(folder) as found:
        yield found


@pytest.fixture
def doomed(folder: Path) -> Iterator[Routed]:
    with pair(folder) as found:
        yield found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AsyncEngine]:
    """One engine of the same weights and adapters: what all answers are to be."""
    engine = make_engine(tmp_path_factory.mktemp("alone"), kv_budget_bytes=64 * 1024**2)
    yield engine
    asyncio.run(engine.aclose())


async def talk(backend: RemoteBackend | AsyncEngine, opening: str) -> AsyncIterator[Completion]:
    """A conversation of a few turns: each has two adapters and a plain LoRA beside the base model's streamed answer."""
    messages: list[Message] = [Message(role="user", content=opening)]
    for turn in range(TURNS):
        chat = Chat(messages=tuple(messages))
        yield await backend.complete(Request(prompt=chat, adapter="jailbreak", invoke=True, params=LABEL))
        deltas = [delta async for delta in backend.stream(Request(prompt=chat, params=PARAMS))]
        answer = deltas[-1].completion
        assert answer is not None
        yield answer
        messages.append(Message(role="assistant", content=answer.choices[0].text.replace("\ufffd", "?")))
        chat = Chat(messages=tuple(messages))
        yield await backend.complete(Request(prompt=chat, adapter="certainty", invoke=True, params=LABEL))
        yield await backend.complete(Request(prompt=chat, adapter="twin", params=LABEL))
        messages.append(Message(role="user", content=f"And {turn} more?"))


async def all_of(backend: RemoteBackend | AsyncEngine, opening: str) -> list[Completion]:
    return [completion async for completion in talk(backend, opening)]


def tokens_of(completions: list[Completion]) -> list[tuple[int, ...]]:
    return [completion.choices[0].token_ids for completion in completions]


async def test_a_conversation_reuses_on_two_servers_what_it_would_on_one(behind: Routed, alone: AsyncEngine) -> None:
    heard = Heard()
    async with RemoteBackend(behind.url, transport=heard) as backend:
        for opening in CONVERSATIONS:
            there, here = await all_of(backend, opening), await all_of(alone, opening)
            assert tokens_of(there) == tokens_of(here)
            # The first call of a conversation, and the first of the plain LoRA, share what others began with alike.
            cached = [
                (one.usage.cached_tokens, other.usage.cached_tokens) for one, other in zip(there, here, strict=True)
            ]
            assert [one for one, _ in cached[4:]] == [other for _, other in cached[4:]]
            assert min(one for one, _ in cached[4:]) > len(opening)
    assert len(heard.replicas) == len(CONVERSATIONS)
    for session, replicas in heard.replicas.items():
        assert len(set(replicas)) == 1, session
        assert len(replicas) == 4 * TURNS
        assert heard.models[session] == {"tiny", "jailbreak", "certainty", "twin"}
    assert {replicas[0] for replicas in heard.replicas.values()} == {"replica1", "replica2"}


async def test_a_lost_server_costs_no_answer(doomed: Routed, alone: AsyncEngine) -> None:
    expected = [tokens_of(await all_of(alone, opening)) for opening in CONVERSATIONS]
    heard = Heard()
    lost = doomed.replicas["replica1"]

    async def kill() -> None:
        while sum(replicas.count("replica1") for replicas in heard.replicas.values()) < 5:
            await asyncio.sleep(0.002)
        lost.send_signal(signal.SIGKILL)

    async with RemoteBackend(doomed.url, transport=heard) as backend, asyncio.timeout(120):
        found, _ = await asyncio.gather(asyncio.gather(*(all_of(backend, each) for each in CONVERSATIONS)), kill())
    assert [tokens_of(each) for each in found] == expected
    assert lost.wait(10) == -signal.SIGKILL
    moved = [replicas for replicas in heard.replicas.values() if set(replicas) == {"replica1", "replica2"}]
    assert moved, "the server was killed before it had answered anything"
    for replicas in moved:
        assert sorted(replicas) == replicas, "a conversation came back to a server that is gone"


def test_a_plain_clients_request_goes_to_the_other_server(doomed: Routed) -> None:
    """Without midstream's backend: the router alone repeats what has no answer yet."""
    body = {"model": "tiny", "prompt": [40, 41, 42], "max_tokens": 400, "ignore_eos": True, "temperature": 0}

    def post(session: int, **settings: Any) -> httpx.Response:
        headers = {SESSION_HEADER: f"session-{session}"}
        return httpx.post(f"{doomed.url}/v1/completions", json={**body, **settings}, headers=headers, timeout=60)

    homes = [post(session, max_tokens=1).headers["x-replica"] for session in range(12)]
    assert set(homes) == {"replica1", "replica2"}
    with ThreadPoolExecutor(12) as pool:
        answers = [pool.submit(post, session) for session in range(12)]
        busy = f"{doomed.urls['replica1']}/metrics"
        while "vllm:num_requests_running" not in httpx.get(busy).text or not _running(httpx.get(busy).text):
            assert not all(answer.done() for answer in answers), "all was answered before the server was lost"
        doomed.replicas["replica1"].send_signal(signal.SIGKILL)
        found = [answer.result() for answer in answers]
    assert [answer.status_code for answer in found] == [200] * 12
    assert len({answer.json()["choices"][0]["text"] for answer in found}) == 1
    assert {answer.headers["x-replica"] for answer in found} >= {"replica2"}


def _running(metrics: str) -> bool:
    lines = [line for line in metrics.splitlines() if line.startswith("vllm:num_requests_running")]
    return any(float(line.rsplit(" ", 1)[1]) > 0 for line in lines)


def test_a_request_larger_than_a_buffer_passes(behind: Routed) -> None:
    body = {"model": "tiny", "prompt": "x" * 900_000, "max_tokens": 1}
    answer = httpx.post(f"{behind.url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"
