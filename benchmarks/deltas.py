"""What adapters add to a decode step: a row of each of several different adapters, beside as many of the base model."""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import context, machine, spread, write
from midstream.bench.adapters import write_random
from midstream.bench.model import ModelFacts
from midstream.session import Engine
from midstream.types import Completion, Request, SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--context", type=int, default=500)
    parser.add_argument("--adapters", type=int, default=6)
    parser.add_argument("--ranks", default="8,16,32,64")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with Engine.load(dtype=arguments.dtype, wait_for_kernels=True) as engine:
        facts = ModelFacts.of(engine)
        rows = [measure(engine, facts, arguments, int(rank)) for rank in arguments.ranks.split(",")]
    write(arguments.json, {"machine": machine(), "dtype": facts.dtype_name, "rows": rows})


def measure(engine: Engine, facts: ModelFacts, arguments: argparse.Namespace, rank: int) -> dict[str, Any]:
    """The row of a report: random adapters of one rank over all linear layers, all different."""
    invocation = engine.aio.chat.encode("<|im_start|>bench\n")
    prompt = (*context(engine, arguments.context), *invocation)
    names: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.adapters):
            path = Path(folder) / f"rank{rank}-{number}"
            write_random(path, facts.linear_shapes, rank, invocation, seed=number)
            names.append(engine.load_adapter(path).name)
    sides: dict[str, Sequence[str | None]] = {"base": [None] * len(names), "adapters": names}
    raw: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(arguments.rounds + 1):
        for side, owners in sides.items():
            seconds = step_seconds(engine, prompt, owners, arguments.tokens)
            if number:  # the first use of every kernel is not counted
                raw[side].append(seconds)
    for name in names:
        engine.unload_adapter(name)
    middle = {side: statistics.median(values) for side, values in raw.items()}
    return {
        "rank": rank,
        "adapters": len(names),
        "context": arguments.context,
        "base_step_s": middle["base"],
        "adapters_step_s": middle["adapters"],
        "ratio": middle["adapters"] / middle["base"],
        "spread": {side: spread(values) for side, values in raw.items()},
        "raw_s": raw,
    }


def step_seconds(engine: Engine, prompt: tuple[int, ...], owners: Sequence[str | None], tokens: int) -> float:
    """Seconds of a decode step with a row of each owner, all on one conversation."""

    async def together() -> list[Completion]:
        params = SamplingParams(max_tokens=tokens, ignore_eos=True)
        requests = [Request(prompt=prompt, adapter=owner, params=params) for owner in owners]
        return await asyncio.gather(*map(engine.aio.complete, requests))

    done = engine.portal.run(together())
    return statistics.median((c.seconds - (c.time_to_first_token_s or 0.0)) / (tokens - 1) for c in done)


if __name__ == "__main__":
    main()
