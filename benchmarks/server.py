"""What the HTTP server adds to the engine: time to first token at one stream, and throughput at many.

Both sides run the same requests on the same engine in the same process, in turns; the HTTP clients are bare sockets in
a process of their own, so that as little as possible of the machine goes to them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import statistics
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn

from benchmarks.common import machine, spread, write
from midstream.config import ServerConfig
from midstream.engine.engine import AsyncEngine
from midstream.models.source import DEFAULT_MODEL
from midstream.server.app import create_app
from midstream.server.run import GracefulServer
from midstream.types import Chat, Message, Request, SamplingParams

PROMPT = "Tell me about the history of the city. " * 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--firsts", type=int, default=20, help="requests of one round at one stream")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=48, help="of each answer at many streams")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    write(arguments.json, {"machine": machine(), **asyncio.run(measure(arguments))})


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    engine = AsyncEngine.load(arguments.model, wait_for_kernels=True)
    app = create_app(engine, ServerConfig(port=0, playground=False))
    server = GracefulServer(uvicorn.Config(app, port=0, log_config=None, access_log=False), app.state.service)
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    client = context.Process(target=_client_process, args=(port, theirs))
    client.start()
    rows: dict[str, list[float]] = defaultdict(list)
    await _direct(engine, 1, 2)
    await _http(ours, 1, 2)
    for _ in range(arguments.rounds):
        pairs = [((await _direct(engine, 1, 1))[0], (await _http(ours, 1, 1))[0]) for _ in range(arguments.firsts)]
        for side, values in zip(("engine_first_s", "http_first_s"), zip(*pairs, strict=True), strict=True):
            rows[side].append(statistics.median(values))
        rows["added_first_s"].append(statistics.median([http - direct for direct, http in pairs]))
        for side, run in (("engine_tok_s", partial(_direct, engine)), ("http_tok_s", partial(_http, ours))):
            started = time.perf_counter()
            await run(arguments.streams, arguments.tokens)
            rows[side].append(arguments.streams * arguments.tokens / (time.perf_counter() - started))
    ours.send(None)
    await asyncio.to_thread(client.join)
    server.should_exit = True
    await serving
    middle = {name: statistics.median(values) for name, values in rows.items()}
    return {
        "prompt_tokens": len(engine.chat.prompt(Chat(messages=(Message(role="user", content=PROMPT),)))),
        "streams": arguments.streams,
        "added_first_ms": 1000 * middle["added_first_s"],
        "throughput_ratio": middle["http_tok_s"] / middle["engine_tok_s"],
        "spread": {name: spread(values) for name, values in rows.items()},
        "rounds": rows,
    }


async def _direct(engine: AsyncEngine, streams: int, tokens: int) -> list[float]:
    """Seconds to the first token of each stream, on the engine itself."""

    async def one(number: int) -> float:
        chat = Chat(messages=(Message(role="user", content=f"{PROMPT}{number}"),))
        started = time.perf_counter()
        first = 0.0
        params = SamplingParams(max_tokens=tokens, ignore_eos=True)
        async for _ in engine.stream(Request(prompt=chat, params=params)):
            first = first or time.perf_counter() - started
        return first

    return list(await asyncio.gather(*(one(number) for number in range(streams))))


async def _http(pipe: Any, streams: int, tokens: int) -> list[float]:
    pipe.send((streams, tokens))
    return list(await asyncio.to_thread(pipe.recv))


def _client_process(port: int, pipe: Any) -> None:
    async def run(streams: int, tokens: int) -> list[float]:
        return list(await asyncio.gather(*(_stream(port, number, tokens) for number in range(streams))))

    while (asked := pipe.recv()) is not None:
        pipe.send(asyncio.run(run(*asked)))


async def _stream(port: int, number: int, tokens: int) -> float:
    """Seconds from the first byte sent to the first event, over a connection made before."""
    messages = [{"role": "user", "content": f"{PROMPT}{number}"}]
    settings = {"stream": True, "temperature": 0, "max_tokens": tokens, "ignore_eos": True}
    body = json.dumps({"messages": messages, **settings}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    started = time.perf_counter()
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    await reader.readuntil(b"data: ")
    first = time.perf_counter() - started
    rest = await reader.read(-1)
    assert rest.rstrip(b"0\r\n").endswith(b"[DONE]"), rest[-80:]
    writer.close()
    return first


if __name__ == "__main__":
    main()
