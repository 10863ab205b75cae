"""Answers lost with their replica come from another one: whole, the same, and never mended where they differ."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from midstream.errors import BackendError, DeadlineExceeded, EngineStopped, MidstreamError, OverloadedError
from midstream.remote import RemoteBackend, repeat
from midstream.types import Completion, Delta, Request, SamplingParams

MODELS = {"data": [{"id": "tiny", "owned_by": "midstream"}]}
IDS = [11, 12, 13, 14]
TEXTS = ["a", "b", "c", "d"]
USAGE = {"prompt_tokens": 3, "completion_tokens": 4}
WHOLE = {"choices": [{"index": 0, "text": "abcd", "token_ids": IDS, "finish_reason": "stop"}], "usage": USAGE}
GREEDY = Request(prompt=(1, 2, 3), params=SamplingParams(max_tokens=4))

Answer = Callable[[httpx.Request], httpx.Response]


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeat, "_FIRST_WAIT_S", 0.001)


class Replicas:
    """What a router would pass on: the tries of a completion meet these answers, in order."""

    def __init__(self, *answers: Answer) -> None:
        self.answers = answers
        self.asked: list[dict[str, Any]] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json=MODELS)
        if request.url.path == "/tokenize":
            return httpx.Response(404)
        self.asked.append(json.loads(request.content))
        return self.answers[len(self.asked) - 1](request)

    def backend(self, **settings: Any) -> RemoteBackend:
        return RemoteBackend("http://router", transport=httpx.MockTransport(self), **settings)


def refused(request: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("refused", request=request)


def broken(request: httpx.Request) -> httpx.Response:
    raise httpx.RemoteProtocolError("server disconnected", request=request)


def silent(request: httpx.Request) -> httpx.Response:
    raise httpx.ReadTimeout("", request=request)


def says(status: int, message: str, code: str | int | None = None) -> Answer:
    return lambda _: httpx.Response(status, json={"error": {"message": message, "type": "x", "code": code}})


DEAD = says(500, "EngineCore encountered an issue. See stack trace (above) for the root cause.", 500)
LOST = {
    "refused": refused,
    "broken": broken,
    "bad gateway": lambda _: httpx.Response(502, text="<html>bad gateway</html>"),
    "stopping": says(503, "the server is stopping", "engine_stopped"),
    "engine dead": DEAD,
}
KEPT = {
    "silent": (silent, BackendError),
    "failed": (says(500, "boom"), BackendError),
    "busy": (says(429, "later"), OverloadedError),
    "late": (says(504, "late"), DeadlineExceeded),
}


def whole(_: httpx.Request) -> httpx.Response:
    return httpx.Response(200, json=WHOLE)


@pytest.mark.parametrize("fault", LOST)
async def test_a_lost_answer_is_asked_for_again(fault: str) -> None:
    replicas = Replicas(LOST[fault], LOST[fault], whole)
    async with replicas.backend() as backend:
        found = await backend.complete(GREEDY)
    assert found.choices[0].token_ids == tuple(IDS)
    assert replicas.asked == [replicas.asked[0]] * 3


@pytest.mark.parametrize("fault", LOST)
@pytest.mark.parametrize("repeats", [0, 2])
async def test_the_last_tries_error_is_told(fault: str, repeats: int) -> None:
    replicas = Replicas(*[LOST[fault]] * (repeats + 1))
    async with replicas.backend(repeats=repeats) as backend:
        with pytest.raises(MidstreamError) as found:
            await backend.complete(GREEDY)
    assert type(found.value) is (EngineStopped if fault == "stopping" else BackendError)
    assert len(replicas.asked) == repeats + 1


@pytest.mark.parametrize("fault", KEPT)
async def test_a_server_that_is_there_is_asked_once(fault: str) -> None:
    answer, kind = KEPT[fault]
    replicas = Replicas(answer)
    async with replicas.backend() as backend:
        with pytest.raises(kind):
            await backend.complete(GREEDY)
    assert len(replicas.asked) == 1


async def test_a_deadline_ends_the_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeat, "_FIRST_WAIT_S", 60.0)
    replicas = Replicas(refused, whole)
    async with replicas.backend() as backend, asyncio.timeout(20):
        with pytest.raises(DeadlineExceeded):
            await backend.complete(GREEDY.model_copy(update={"deadline_s": 0.2}))


# ---------------------------------------------------------------------- streams


def stream(*events: dict[str, Any], fault: type[httpx.HTTPError] | None = None, done: bool = True) -> Answer:
    """Events, and then the end, a fault of the connection, or an end in the middle."""

    def parts() -> Iterator[bytes]:
        for event in events:
            yield b"data: " + json.dumps(event).encode() + b"\n\n"
        if fault is not None:
            raise fault("broke off")
        if done:
            yield b"data: [DONE]\n\n"

    class Parts(httpx.AsyncByteStream):
        async def __aiter__(self) -> Any:
            for part in parts():
                yield part

    return lambda _: httpx.Response(200, stream=Parts(), headers={"content-type": "text/event-stream"})


def piece(first: int, last: int, *, reason: str | None = None, index: int = 0, ids: list[int] = IDS) -> dict[str, Any]:
    """The tokens from `first` up to `last`, with a logprob of each that says which token it is."""
    tokens = [f"token_id:{token}" for token in ids[first:last]]
    logprobs = {
        "tokens": tokens,
        "token_logprobs": [-float(token) for token in ids[first:last]],
        "top_logprobs": [{token: -1.0} for token in tokens],
        "token_texts": dict(zip(tokens, TEXTS[first:last], strict=True)),
    }
    text = "".join(TEXTS[first:last])
    choice = {"index": index, "text": text, "token_ids": ids[first:last], "finish_reason": reason}
    return {"choices": [{**choice, "logprobs": logprobs}]}


END = {"choices": [], "usage": USAGE}
CUTS = [
    [(0, 4)],
    [(0, 1), (1, 4)],
    [(0, 2), (2, 4)],
    [(0, 3), (3, 4)],
    [(0, 1), (1, 2), (2, 3), (3, 4)],
]


def pieces_of(cuts: list[tuple[int, int]]) -> list[dict[str, Any]]:
    return [piece(first, last, reason="stop" if last == 4 else None) for first, last in cuts]


async def told(backend: RemoteBackend, request: Request) -> tuple[list[Delta], Completion]:
    *deltas, last = [delta async for delta in backend.stream(request)]
    assert last.completion is not None
    return deltas, last.completion


@pytest.mark.parametrize("again", CUTS)
@pytest.mark.parametrize("ends", ["broken", "closed", "stopping"])
async def test_a_stream_goes_on_where_it_broke_off(ends: str, again: list[tuple[int, int]]) -> None:
    first = [piece(0, 1), piece(1, 2)]
    fault = httpx.ReadError if ends == "broken" else None
    stopped = {"error": {"message": "the server is stopping", "type": "x", "code": "engine_stopped"}}
    begun = stream(*first, *([stopped] if ends == "stopping" else []), fault=fault, done=False)
    replicas = Replicas(begun, stream(*pieces_of(again), END))
    params = SamplingParams(max_tokens=4, logprobs=True)
    async with replicas.backend() as backend:
        deltas, completion = await told(backend, GREEDY.model_copy(update={"params": params}))
    assert [token for delta in deltas for token in delta.token_ids] == IDS
    assert "".join(delta.text for delta in deltas) == "abcd"
    assert [token.token_id for delta in deltas for token in delta.logprobs] == IDS
    choice = completion.choices[0]
    assert (choice.token_ids, choice.text, choice.finish_reason) == (tuple(IDS), "abcd", "stop")
    assert choice.logprobs is not None
    assert [token.logprob for token in choice.logprobs] == [-float(token) for token in IDS]


async def test_a_stream_that_breaks_off_twice_goes_on_twice() -> None:
    replicas = Replicas(
        stream(piece(0, 3), fault=httpx.ReadError),
        stream(piece(0, 1), fault=httpx.ReadError),
        refused,
        stream(piece(0, 4, reason="stop"), END),
    )
    async with replicas.backend() as backend:
        deltas, completion = await told(backend, GREEDY)
    assert [delta.token_ids for delta in deltas] == [(11, 12, 13), (14,)]
    assert completion.choices[0].text == "abcd"


async def test_each_answer_of_several_goes_on_by_itself() -> None:
    begun = stream(piece(0, 3), piece(0, 1, index=1), fault=httpx.ReadError)
    again = stream(
        piece(0, 2), piece(0, 2, index=1), piece(2, 4, reason="stop"), piece(2, 4, index=1, reason="stop"), END
    )
    replicas = Replicas(begun, again)
    params = SamplingParams(max_tokens=4, n=2, temperature=1.0, seed=5)
    async with replicas.backend() as backend:
        deltas, completion = await told(backend, GREEDY.model_copy(update={"params": params}))
    for index in (0, 1):
        assert [token for delta in deltas if delta.index == index for token in delta.token_ids] == IDS
        assert completion.choices[index].text == "abcd"


@pytest.mark.parametrize("other", [[11, 99, 13, 14], [11]])
async def test_another_answer_is_said_and_not_mended(other: list[int]) -> None:
    replicas = Replicas(
        stream(piece(0, 1), piece(1, 2), fault=httpx.ReadError),
        stream(piece(0, len(other), ids=other, reason="stop"), END),
    )
    async with replicas.backend() as backend:
        with pytest.raises(BackendError, match="another one"):
            await told(backend, GREEDY)


async def test_a_sample_without_a_seed_is_not_asked_for_again_once_begun() -> None:
    sampled = GREEDY.model_copy(update={"params": SamplingParams(max_tokens=4, temperature=1.0)})
    begun = Replicas(stream(piece(0, 1), fault=httpx.ReadError), stream(piece(0, 4, reason="stop"), END))
    async with begun.backend() as backend:
        with pytest.raises(BackendError, match="broke off"):
            await told(backend, sampled)
    assert len(begun.asked) == 1
    unbegun = Replicas(stream(fault=httpx.ReadError), stream(piece(0, 4, reason="stop"), END))
    async with unbegun.backend() as backend:
        assert (await told(backend, sampled))[1].choices[0].text == "abcd"


async def test_a_stream_that_was_refused_has_the_servers_error() -> None:
    replicas = Replicas(says(429, "later"))
    async with replicas.backend() as backend:
        with pytest.raises(OverloadedError):
            await told(backend, GREEDY)
    assert len(replicas.asked) == 1
