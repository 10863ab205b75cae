"""Servers that fail, hang, lie or break off: always a typed error, never a hang, and no KV is held after."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from midstream import errors
from midstream.backend import Portal, SyncBackend
from midstream.errors import BackendError, DeadlineExceeded, EngineStopped, InputError, MidstreamError, OverloadedError
from midstream.remote import RemoteBackend
from midstream.remote.faults import PathMissing
from midstream.server.replies import error_object
from midstream.types import Chat, Choice, Message, Request, SamplingParams
from tests.server.running import Running, make_engine, running, settled

REQUEST = Request(prompt=(40, 41, 42), params=SamplingParams(max_tokens=3))
MODELS = {"data": [{"id": "tiny", "owned_by": "midstream"}]}
CHOICE = {"index": 0, "text": "abc", "token_ids": [1, 2, 3], "finish_reason": "stop"}
USAGE = {"prompt_tokens": 3, "completion_tokens": 3}


def answering(status: int = 200, body: Any = None, *, content: bytes | None = None) -> RemoteBackend:
    """A backend whose server lists its model and answers everything else in one way."""

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json=MODELS)
        sent = json.dumps(body).encode() if content is None else content
        return httpx.Response(status, content=sent)

    return RemoteBackend("http://server:8000", transport=httpx.MockTransport(answer))


async def last_of(stream: AsyncIterator[Any]) -> Any:
    return [delta async for delta in stream][-1]


VERBS: dict[str, Callable[[RemoteBackend, Request], Awaitable[Any]]] = {
    "complete": lambda backend, request: backend.complete(request),
    "stream": lambda backend, request: last_of(backend.stream(request)),
    "score": lambda backend, request: backend.score(request, [[1]]),
}


def tree(root: type[MidstreamError] = MidstreamError) -> Iterator[type[MidstreamError]]:
    yield root
    for child in root.__subclasses__():
        yield from tree(child)


# ---------------------------------------------------------------------- what the server says


@pytest.mark.parametrize("kind", [k for k in tree() if k.__module__ == "midstream.errors"], ids=lambda k: k.__name__)
async def test_every_error_of_a_midstream_server_comes_back_as_itself(kind: type[MidstreamError]) -> None:
    if kind.__init__ is not MidstreamError.__init__:
        error: MidstreamError = kind("place", ["what is wrong"])  # type: ignore[call-arg]
    else:
        error = kind("what is wrong")
    async with answering(error.status, {"error": error_object(error)}) as backend:
        with pytest.raises(MidstreamError) as found:
            await backend.complete(REQUEST)
    assert "what is wrong" in str(found.value)
    assert found.value.status == error.status
    if kind not in (errors.DataError, errors.AccessError):  # never sent by a server; the first has no code of its own
        assert found.value.code == error.code
        assert isinstance(error, type(found.value))


@pytest.mark.parametrize(
    ("status", "body", "kind", "text"),
    [
        (401, {"error": "Unauthorized"}, errors.Unauthorized, "Unauthorized"),
        (403, "no", errors.Forbidden, "no"),
        (429, {"error": {"message": "busy", "type": "x", "code": 429}}, OverloadedError, "busy"),
        (429, {}, OverloadedError, "429"),
        (500, {"error": {"message": "boom", "type": "InternalServerError", "code": 500}}, BackendError, "boom"),
        (502, "bad gateway", BackendError, "bad gateway"),
        (503, "later", EngineStopped, "later"),
        (504, "late", DeadlineExceeded, "late"),
        (404, {"detail": "Not Found"}, PathMissing, "right server"),
        (404, {"error": {"message": "gone", "type": "NotFoundError", "code": 404}}, errors.ModelNotFound, "gone"),
        (400, {"object": "error", "message": "bad n", "type": "BadRequestError", "code": 400}, InputError, "bad n"),
        (
            400,
            {"error": {"message": "This model's maximum context length is 9 tokens.", "type": "x", "code": 400}},
            errors.PromptTooLong,
            "9 tokens",
        ),
        (422, {"detail": [{"msg": "field required"}]}, InputError, "field required"),
        (302, "", BackendError, "302"),
        (418, "\x00\xff" * 5000, InputError, "418"),
    ],
)
@pytest.mark.parametrize("verb", VERBS)
async def test_other_servers_errors_are_read_by_their_status(
    verb: str, status: int, body: Any, kind: type[MidstreamError], text: str
) -> None:
    async with answering(status, body) as backend:
        with pytest.raises(MidstreamError, match=text) as found:
            await VERBS[verb](backend, REQUEST)
    assert type(found.value) is kind
    assert len(str(found.value)) < 1000


@pytest.mark.parametrize(
    "content",
    [
        b"<html>hello</html>",
        b"",
        b"[1]",
        b"null",
        b"[" * 100_000,
        b"\xff\xfe",
        json.dumps({"choices": [CHOICE]}).encode(),
        json.dumps({"choices": [], "usage": USAGE}).encode(),
        json.dumps({"choices": [CHOICE, {**CHOICE, "index": 1}], "usage": USAGE}).encode(),
        json.dumps({"choices": [{**CHOICE, "index": 4}], "usage": USAGE}).encode(),
        json.dumps({"choices": [{**CHOICE, "token_ids": None}], "usage": USAGE}).encode(),
        json.dumps({"choices": [{**CHOICE, "token_ids": ["x"]}], "usage": USAGE}).encode(),
        json.dumps({"choices": [{**CHOICE, "finish_reason": None}], "usage": USAGE}).encode(),
        json.dumps({"choices": [{**CHOICE, "finish_reason": "error"}], "usage": USAGE}).encode(),
        json.dumps({"choices": [CHOICE], "usage": {"prompt_tokens": "many"}}).encode(),
        json.dumps({"choices": "none", "usage": USAGE}).encode(),
    ],
    ids=range(16),
)
@pytest.mark.parametrize("verb", VERBS)
async def test_what_cannot_be_understood_is_a_backend_error(verb: str, content: bytes) -> None:
    if verb == "stream":
        content = b"data: " + content + b"\n\ndata: [DONE]\n\n"
    async with answering(content=content) as backend:
        with pytest.raises(BackendError, match="http://server:8000"):
            await VERBS[verb](backend, REQUEST)


@pytest.mark.parametrize(
    "logprobs",
    [
        None,
        {"tokens": ["a", "b", "c"], "token_logprobs": [-1, -1, -1], "top_logprobs": [{}, {}, {}]},
        {"tokens": ["token_id:1"], "token_logprobs": [-1], "top_logprobs": [{}]},
        {"tokens": ["token_id:1", "token_id:2", "token_id:9"], "token_logprobs": [-1] * 3, "top_logprobs": [{}] * 3},
        {"tokens": ["token_id:1", "token_id:2", "token_id:3"], "token_logprobs": [-1], "top_logprobs": [{}] * 3},
    ],
)
async def test_logprobs_of_other_tokens_are_refused(logprobs: Any) -> None:
    body = {"choices": [{**CHOICE, "logprobs": logprobs}], "usage": USAGE}
    async with answering(body=body) as backend:
        with pytest.raises(BackendError):
            await backend.complete(Request(prompt=(1,), params=SamplingParams(logprobs=True)))


async def test_an_error_within_a_stream_ends_it_with_its_own_type() -> None:
    content = (
        b'data: {"choices": [{"index": 0, "text": "a", "token_ids": [1]}]}\n\n'
        b'data: {"error": {"message": "too late", "type": "server_error", "code": "deadline_exceeded"}}\n\n'
        b"data: [DONE]\n\n"
    )
    async with answering(content=content) as backend:
        stream = backend.stream(REQUEST)
        assert (await anext(stream)).text == "a"
        with pytest.raises(DeadlineExceeded, match="too late"):
            await anext(stream)


async def test_events_are_parted_by_newlines_alone() -> None:
    piece = {"choices": [{**CHOICE, "text": "one\u2028two\x85three", "token_ids": [1, 2, 3]}]}
    lines = [json.dumps(piece, ensure_ascii=False), json.dumps({"choices": [], "usage": USAGE}), "[DONE]"]
    content = "".join(f"event: x\r\ndata:{line}\r\n\r\n" for line in lines).encode()
    async with answering(content=content) as backend:
        assert (await last_of(backend.stream(REQUEST))).completion.text == "one\u2028two\x85three"


# ---------------------------------------------------------------------- what the connection does


async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


async def drop(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")


def sending(part: bytes, after: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        writer.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
        await writer.drain()
        await after(reader, writer)

    return handler


async def end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"0\r\n\r\n")


async def part(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    pass


PIECE = b'data: {"choices": [{"index": 0, "text": "a", "token_ids": [1], "finish_reason": null}]}\n\n'
FAULTS = {
    "hangs": hang,
    "drops": drop,
    "hangs in the middle": sending(PIECE, hang),
    "drops in the middle": sending(PIECE, part),
    "ends too soon": sending(PIECE, end),
    "drops within an event": sending(PIECE[:20], part),
}


@asynccontextmanager
async def raw(fault: Callable[..., Awaitable[None]]) -> AsyncIterator[str]:
    """A server that lists its model, and then does something wrong. At the end no connection may be open."""
    tasks: set[asyncio.Task[None] | None] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.current_task())
        head = await reader.readline()
        try:
            if b"/v1/models" in head:
                body = json.dumps(MODELS).encode()
                await reader.readuntil(b"\r\n\r\n")
                writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
                await writer.drain()
            else:
                await fault(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with asyncio.timeout(20):
            await asyncio.gather(*(task for task in tasks if task is not None))
    finally:
        server.close()


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("fault", FAULTS)
async def test_nothing_hangs(fault: str, verb: str) -> None:
    async with raw(FAULTS[fault]) as url, RemoteBackend(url, timeout_s=0.3) as backend:
        async with asyncio.timeout(20):
            with pytest.raises(BackendError, match=url):
                await VERBS[verb](backend, REQUEST)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("fault", ["hangs", "hangs in the middle"])
async def test_a_deadline_bounds_every_call(fault: str, verb: str) -> None:
    request = REQUEST.model_copy(update={"deadline_s": 0.3})
    async with raw(FAULTS[fault]) as url, RemoteBackend(url) as backend:
        async with asyncio.timeout(20):
            with pytest.raises(DeadlineExceeded, match=r"0\.300 s"):
                await VERBS[verb](backend, request)


async def test_a_server_that_is_not_there_is_named_without_its_credentials() -> None:
    for url in ("http://me:secret@127.0.0.1:9/v1", "http://me:secret@no-such-host.invalid"):
        async with RemoteBackend(url) as backend:
            assert "secret" not in backend.url
            with pytest.raises(BackendError, match="cannot be reached") as found:
                await backend.adapters()
            assert "secret" not in str(found.value)


async def test_a_list_without_a_base_model_needs_one_named() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json={"data": []})

    async with RemoteBackend("http://server", transport=httpx.MockTransport(answer)) as backend:
        with pytest.raises(BackendError, match="model="):
            await backend.complete(REQUEST)


# ---------------------------------------------------------------------- how it is made and closed


@pytest.mark.parametrize(
    ("url", "settings"),
    [
        ("localhost:8000", {}),
        ("ftp://host", {}),
        ("http://", {}),
        ("http://host:port", {}),
        ("http://host?version=1", {}),
        ("http://me:secret@host", {"api_key": "key"}),
        ("http://host", {"api_key": "schlüssel"}),
        ("http://host", {"api_key": "two\nlines"}),
    ],
)
def test_bad_settings_are_refused(url: str, settings: dict[str, Any]) -> None:
    with pytest.raises(InputError) as found:
        RemoteBackend(url, **settings)
    assert "secret" not in str(found.value)


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
@pytest.mark.parametrize("prefix", ["", "/behind/a/proxy"])
async def test_the_address_may_end_with_v1_or_not(prefix: str, suffix: str) -> None:
    asked = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append((request.url.path, request.headers.get("authorization")))
        return httpx.Response(200, json={**MODELS, "tokens": [1]})

    url = f"https://host{prefix}{suffix}"
    async with RemoteBackend(url, api_key="key", transport=httpx.MockTransport(answer)) as backend:
        await backend.tokenize("x")
    assert asked == [(f"{prefix}/v1/models", "Bearer key"), (f"{prefix}/tokenize", "Bearer key")]


async def test_a_closed_backend_takes_nothing(far: RemoteBackend) -> None:
    await far.complete(REQUEST)
    await far.aclose()
    await far.aclose()
    with pytest.raises(EngineStopped, match="was closed"):
        await far.complete(REQUEST)


def test_it_works_in_several_event_loops_and_synchronously(server: Running) -> None:
    backend = RemoteBackend(server.url)

    async def once() -> str:
        text = (await backend.complete(REQUEST)).text
        await backend._channel._clients[asyncio.get_running_loop()].aclose()
        return text

    assert asyncio.run(once()) == asyncio.run(once())
    portal, backend = Portal(), RemoteBackend(server.url)
    sync = SyncBackend(backend, portal)
    try:
        *pieces, last = sync.stream(REQUEST)
        assert last.completion is not None
        assert "".join(piece.text for piece in pieces) == last.completion.text == sync.complete(REQUEST).text
        assert {info.name for info in sync.adapters()} >= {"jailbreak", "twin"}
    finally:
        portal.run(backend.aclose())
        portal.close()


def test_keys_are_sent(tmp_path: Path) -> None:
    async def texts(url: str) -> list[str]:
        found = []
        for key in ("good", None, "bad"):
            async with RemoteBackend(url, api_key=key) as backend:
                try:
                    found.append((await backend.complete(REQUEST)).text)
                except errors.Unauthorized as error:
                    found.append(error.code)
        return found

    with running(make_engine(tmp_path), api_keys=["good"]) as server:
        first, *others = asyncio.run(texts(server.url))
    assert first not in others
    assert others == ["invalid_api_key"] * 2


# ---------------------------------------------------------------------- leaving


LONG = Request(prompt=tuple(range(40, 90)), params=SamplingParams(max_tokens=1900, ignore_eos=True))


async def test_closing_a_stream_frees_its_kv(server: Running, far: RemoteBackend) -> None:
    stream = far.stream(LONG)
    await anext(stream)
    assert (await server.service.engine.stats()).running
    await stream.aclose()
    await settled(server.service.engine)
    assert not any(node.held for node in await server.service.engine.cache_nodes())


@pytest.mark.parametrize("how", ["cancelled", "deadline"])
async def test_so_does_a_call_that_is_given_up(server: Running, far: RemoteBackend, how: str) -> None:
    engine = server.service.engine
    deadline = 0.3 if how == "deadline" else None
    params = LONG.params.model_copy(update={"n": 8})
    task = asyncio.create_task(far.complete(LONG.model_copy(update={"deadline_s": deadline, "params": params})))
    while not task.done() and not (await engine.stats()).running:  # on a busy machine the deadline may be first
        await asyncio.sleep(0.001)
    if how == "cancelled":
        task.cancel()
    with pytest.raises(asyncio.CancelledError if how == "cancelled" else DeadlineExceeded):
        await task
    await settled(engine)
    assert not any(node.held for node in await engine.cache_nodes())


async def test_one_that_fails_leaves_the_others(far: RemoteBackend) -> None:
    bad = REQUEST.model_copy(update={"adapter": "nobody"})
    results = await asyncio.gather(*(far.complete(r) for r in [REQUEST, bad] * 20), return_exceptions=True)
    assert [isinstance(result, errors.AdapterNotFound) for result in results] == [False, True] * 20
    assert len({result.text for result in results if not isinstance(result, BaseException)}) == 1


async def test_a_prompt_may_be_as_large_as_the_context(far: RemoteBackend) -> None:
    chat = Chat(messages=(Message(role="user", content="x" * 1900),))
    request = Request(prompt=chat, params=SamplingParams(max_tokens=1, constraint=Choice(options=("a", "b"))))
    assert (await far.complete(request)).usage.prompt_tokens > 1900


def test_it_needs_neither_torch_nor_transformers() -> None:
    program = "import sys, midstream.remote; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
