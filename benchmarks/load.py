"""Throughput and latency at 1 to 64 clients, and an adapter's call beside long prefills.

Every client has a conversation of its own: the base model answers, then an adapter is asked for a label on the warm
conversation, again and again without a pause. The label's latency is what a caller waits for.

Beside prefills: the same label call on a conversation that stays warm, alone and while another client has the base
model read one new long prompt after the other. The difference is what the scheduler lets a long prefill take from
others. No two calls are the same, so that none finds its own answer in the cache.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import context, machine, write
from midstream.library import library_folder
from midstream.session import Engine
from midstream.types import Choice, Request, SamplingParams

ADAPTER = "jailbreak"
LABEL = SamplingParams(max_tokens=8, constraint=Choice(options=('"yes"', '"no"')))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", default="1,2,4,8,16,32,64")
    parser.add_argument("--context", type=int, default=500, help="tokens of a client's conversation")
    parser.add_argument("--tokens", type=int, default=32, help="of each base answer")
    parser.add_argument("--seconds", type=float, default=20.0, help="of measuring at each number of clients")
    parser.add_argument("--long", type=int, default=4096, help="tokens of a long prompt")
    parser.add_argument("--probes", type=int, default=30, help="label calls alone, and as many beside long prefills")
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--png", type=Path)
    arguments = parser.parse_args()
    with Engine.load(dtype=arguments.dtype, wait_for_kernels=True) as engine:
        root = library_folder(engine.aio.model_name)
        if root is None:
            raise SystemExit("run from a checkout: the benchmark needs library/")
        engine.load_adapter(root / ADAPTER)
        rows = [engine.portal.run(crowd(engine, int(clients), arguments)) for clients in arguments.clients.split(",")]
        beside = engine.portal.run(beside_prefills(engine, arguments))
    write(arguments.json, {"machine": machine(), "rows": rows, "beside_prefill": beside})
    if arguments.png is not None:
        plot(rows, arguments.png)


async def crowd(engine: Engine, clients: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One row: so many clients for so many seconds, after one uncounted turn of each."""
    conversations = [own(engine, number, arguments.context) for number in range(clients)]
    await engine.aio.clear_cache()
    await asyncio.gather(*(turn(engine, conversation, arguments.tokens) for conversation in conversations))
    until = time.perf_counter() + arguments.seconds

    async def client(conversation: tuple[int, ...]) -> list[tuple[float, float, int]]:
        done: list[tuple[float, float, int]] = []
        while time.perf_counter() < until:
            done.append(await turn(engine, conversation, arguments.tokens, len(done) + 1))
        return done

    started = time.perf_counter()
    turns = [t for found in await asyncio.gather(*map(client, conversations)) for t in found]
    seconds = time.perf_counter() - started
    return {
        "clients": clients,
        "turns": len(turns),
        "tokens_per_s": sum(tokens for _, _, tokens in turns) / seconds,
        "label_s": percentiles([label for _, label, _ in turns]),
        "answer_token_s": percentiles([answer / tokens for answer, _, tokens in turns]),
    }


async def turn(engine: Engine, conversation: tuple[int, ...], tokens: int, number: int = 0) -> tuple[float, float, int]:
    """Seconds of a base answer, seconds of the label call after it, tokens of the answer."""
    params = SamplingParams(max_tokens=tokens, ignore_eos=True)
    asked = numbered(engine, conversation, number)
    answer = await engine.aio.complete(Request(prompt=asked, params=params))
    label = await engine.aio.complete(called(engine, (*asked, *answer.token_ids)))
    return answer.seconds, label.seconds, len(answer.token_ids)


async def beside_prefills(engine: Engine, arguments: argparse.Namespace) -> dict[str, Any]:
    conversation = own(engine, 0, 1000)
    await engine.aio.warm(conversation)

    async def probe(number: int) -> float:
        return (await engine.aio.complete(called(engine, numbered(engine, conversation, number)))).seconds

    await probe(0)
    alone = [await probe(number + 1) for number in range(arguments.probes)]

    async def read() -> None:
        for number in range(1, 1_000_000):
            await engine.aio.complete(
                Request(prompt=own(engine, number, arguments.long), params=SamplingParams(max_tokens=1))
            )

    reading = asyncio.create_task(read())
    beside: list[float] = []
    for number in range(arguments.probes):
        await asyncio.sleep(0.15)
        beside.append(await probe(-number - 1))
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    return {"alone_s": percentiles(alone), "beside_s": percentiles(beside), "long_tokens": arguments.long}


def own(engine: Engine, number: int, tokens: int) -> tuple[int, ...]:
    """A conversation that shares no prefix with those of other numbers."""
    mark = engine.aio.chat.encode(f"{number:06d}\n")
    return (*mark, *context(engine, tokens - len(mark)))


def numbered(engine: Engine, conversation: tuple[int, ...], number: int) -> tuple[int, ...]:
    return (*conversation, *engine.aio.chat.encode(f"{number}\n"))


def called(engine: Engine, conversation: tuple[int, ...]) -> Request:
    info = engine.aio.adapter(ADAPTER)
    assert info is not None
    return Request(prompt=(*conversation, *info.invocation_tokens), adapter=ADAPTER, params=LABEL)


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Seconds: median, 95th percentile, most."""
    median, high = np.percentile(values, [50, 95])
    return {"median": float(median), "p95": float(high), "max": max(values)}


def table(report: dict[str, Any]) -> str:
    """The rows as Markdown."""
    lines = ["| clients | tokens/s | a token, ms | label call, ms: median | 95th percentile |", "|---|---|---|---|---|"]
    for row in report["rows"]:
        token, label = row["answer_token_s"]["median"], row["label_s"]
        times = f"{1e3 * token:.1f} | {1e3 * label['median']:,.0f} | {1e3 * label['p95']:,.0f}"
        lines.append(f"| {row['clients']} | {row['tokens_per_s']:.0f} | {times} |")
    return "\n".join(lines) + "\n"


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Tokens per second, and the label's latency, over the number of clients."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    clients = [row["clients"] for row in rows]
    left.plot(clients, [row["tokens_per_s"] for row in rows], marker="o")
    left.set(xlabel="clients", ylabel="answer tokens per second", xscale="log")
    for key, label in (("median", "median"), ("p95", "95th percentile")):
        right.plot(clients, [1e3 * row["label_s"][key] for row in rows], marker="o", label=label)
    right.set(xlabel="clients", ylabel="label call, ms", xscale="log", yscale="log")
    right.legend()
    for axes in (left, right):
        axes.set_xticks(clients, [str(n) for n in clients])
        axes.minorticks_off()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
