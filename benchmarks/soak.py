"""200 streaming clients over 20 conversations for a minute, a third of them leaving at random moments.

Every other one must finish or be refused properly, the KV in use must return to what is cached, memory must grow by
less than 5 %, and the engine's state must be whole. The server runs in this process, so that its inside can be checked;
the clients run in another.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import psutil
import uvicorn

from benchmarks.common import machine, write
from midstream.config import EngineConfig, ServerConfig
from midstream.engine.engine import AsyncEngine
from midstream.library import library_adapters
from midstream.models.source import DEFAULT_MODEL
from midstream.server.app import create_app
from midstream.server.run import GracefulServer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--conversations", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument(
        "--kv-mib", type=int, default=96, help="small, so that the cache is full and evicts from early on"
    )
    parser.add_argument("--warm-up", type=float, default=60, help="seconds of the same load before memory is read")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    write(arguments.json, {"machine": machine(), **asyncio.run(soak(arguments))})


async def soak(arguments: argparse.Namespace) -> dict[str, Any]:
    memory = EngineConfig(kv_budget_bytes=arguments.kv_mib * 2**20)
    engine = AsyncEngine.load(arguments.model, config=memory, wait_for_kernels=True)
    for folder in library_adapters(engine.model_name):
        await engine.load_adapter(folder)
    names = [None, *(info.name for info in engine.adapter_infos() if info.kind == "alora")]
    app = create_app(engine, ServerConfig(port=0, max_streams_per_key=10_000, playground=False))
    config = uvicorn.Config(app, port=0, log_config=None, access_log=False)
    server = GracefulServer(config, app.state.service)
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    # The matrix library makes kernels for each number of rows it meets, some 170 MB of them before it has them all
    # (a bare loop over its products shows the same, and then stays flat): growth counts from there.
    await _load(url, names, arguments, seconds=arguments.warm_up)
    await _rest(engine)
    before = psutil.Process().memory_info().rss
    counts = await _load(url, names, arguments, seconds=arguments.seconds)
    stats = await _rest(engine)
    after = psutil.Process().memory_info().rss
    held = [node for node in await engine.cache_nodes(limit=100_000) if node.held]
    await engine.check_integrity()
    cached = stats.kv_used_bytes
    await engine.clear_cache()
    rest = (await engine.stats()).kv_used_bytes
    server.should_exit = True
    await serving
    return {
        "clients": arguments.clients,
        "warm_up_s": arguments.warm_up,
        "seconds": arguments.seconds,
        "kv_mib": arguments.kv_mib,
        "outcomes": dict(counts),
        "rss_before_mb": before // 2**20,
        "rss_after_mb": after // 2**20,
        "rss_growth": after / before - 1,
        "kv_cached_bytes_after": cached,
        "kv_nodes_held_after": len(held),
        "kv_bytes_after_clearing": rest,
        "integrity": "holds",
    }


async def _load(url: str, names: list[str | None], arguments: argparse.Namespace, *, seconds: float) -> Counter[str]:
    """Run the clients in a process of their own and count what became of each request."""
    context = multiprocessing.get_context("spawn")
    queue: Any = context.Queue()
    settings = (url, names, arguments.clients, arguments.conversations, seconds, queue)
    process = context.Process(target=_clients, args=settings)
    process.start()
    counts = await asyncio.to_thread(queue.get)
    await asyncio.to_thread(process.join)
    return Counter(counts)


def _clients(url: str, names: list[str | None], clients: int, conversations: int, seconds: float, queue: Any) -> None:
    async def run() -> Counter[str]:
        counts: Counter[str] = Counter()
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as http:
            end = time.monotonic() + seconds
            await asyncio.gather(*(_client(http, i, names, conversations, end, counts) for i in range(clients)))
        return counts

    queue.put(dict(asyncio.run(run())))


async def _client(
    http: httpx.AsyncClient, number: int, names: list[str | None], conversations: int, end: float, counts: Counter[str]
) -> None:
    rng = random.Random(number)
    while time.monotonic() < end:
        topic = (number + rng.randrange(3)) % conversations
        messages = [{"role": "user", "content": f"Conversation {topic}. " + "Tell me more about this. " * (5 + topic)}]
        body = {"messages": messages, "model": rng.choice(names), "stream": True, "max_tokens": 24, "ignore_eos": True}
        leaves_after = rng.randrange(1, 12) if rng.random() < 1 / 3 else None
        try:
            counts[await _request(http, body, leaves_after)] += 1
        except httpx.HTTPError as error:
            counts[f"broken: {type(error).__name__}"] += 1


async def _request(http: httpx.AsyncClient, body: dict[str, Any], leaves_after: int | None) -> str:
    lines = 0
    last = ""
    async with http.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code == 429:
            await response.aread()
            await asyncio.sleep(float(response.headers["retry-after"]))
            return "refused with 429 and Retry-After"
        if response.status_code != 200:
            return f"status {response.status_code}"
        async for line in response.aiter_lines():
            lines += bool(line)
            last = line or last
            if leaves_after is not None and lines >= leaves_after:
                return "left"
    return "finished" if last == "data: [DONE]" else "cut short"


async def _rest(engine: AsyncEngine) -> Any:
    while True:
        stats = await engine.stats()
        if not stats.running and not stats.queued:
            return stats
        await asyncio.sleep(0.05)


if __name__ == "__main__":
    main()
