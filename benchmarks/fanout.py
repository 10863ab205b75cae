"""Several different intrinsics on one conversation in one call, against one of them."""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import context, load_variants, machine, spread, timed, write
from midstream.session import Engine
from midstream.types import Choice, Completion, Request, SamplingParams

LABEL = SamplingParams(max_tokens=8, constraint=Choice(options=('"yes"', '"no"')))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contexts", default="500,1500,3000")
    parser.add_argument("--k", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, Engine.load(dtype=arguments.dtype, wait_for_kernels=True) as engine:
        names = load_variants(engine, arguments.k, Path(folder))
        lengths = [int(n) for n in arguments.contexts.split(",")]
        measure(engine, names, min(lengths), 1)  # first use of every kernel
        rows = [measure(engine, names, n, arguments.rounds) for n in lengths]
    write(arguments.json, {"machine": machine(), "dtype": arguments.dtype or "default", "rows": rows})


def measure(engine: Engine, names: list[str], tokens: int, rounds: int) -> dict[str, Any]:
    conversation = context(engine, tokens)
    infos = {info.name: info for info in engine.adapters()}
    requests = [
        Request(prompt=(*conversation, *infos[name].invocation_tokens), adapter=name, params=LABEL) for name in names
    ]
    one: list[float] = []
    all_: list[float] = []
    memory = {"one": 0, "all": 0}
    forwards = 0
    for number in range(rounds):
        fresh(engine, conversation)
        one.append(timed(lambda: run(engine, [requests[number % len(requests)]])))  # noqa: B023 - called at once
        memory["one"] = engine.stats().kv_used_bytes
        fresh(engine, conversation)
        before = engine.stats().forwards
        all_.append(timed(lambda: run(engine, requests)))
        forwards = engine.stats().forwards - before
        memory["all"] = engine.stats().kv_used_bytes
    return {
        "context": tokens,
        "k": len(names),
        "one_s": statistics.median(one),
        "fanout_s": statistics.median(all_),
        "ratio": statistics.median(all_) / statistics.median(one),
        "forwards": forwards,
        "kv_bytes_ratio": memory["all"] / memory["one"],
        "spread": {"one": spread(one), "fanout": spread(all_)},
        "raw_s": {"one": one, "fanout": all_},
    }


def fresh(engine: Engine, conversation: tuple[int, ...]) -> None:
    engine.clear_cache()
    engine.portal.run(engine.aio.warm(conversation))


def run(engine: Engine, requests: list[Request]) -> None:
    async def together() -> list[Completion]:
        return await asyncio.gather(*(engine.aio.complete(request) for request in requests))

    for completion in engine.portal.run(together()):
        assert completion.usage.computed_tokens <= 8, completion.usage


if __name__ == "__main__":
    main()
