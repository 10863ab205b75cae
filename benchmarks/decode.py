"""One stream's decode step beside the time to read the weights and its KV once, and the process's peak memory."""

from __future__ import annotations

import argparse
import resource
import statistics
from pathlib import Path

from benchmarks.common import context, machine, read_bandwidth, spread, write
from midstream.bench.model import ModelFacts
from midstream.config import EngineConfig
from midstream.session import Engine
from midstream.types import Request, SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depths", default="16,2048,4096")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--weights", choices=("int8",))
    parser.add_argument("--kv", choices=("int8",))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    config, options = EngineConfig(kv_dtype=arguments.kv), {"dtype": arguments.dtype, "weights": arguments.weights}
    with Engine.load(config=config, **options, wait_for_kernels=True) as engine:
        facts = ModelFacts.of(engine)
        rows = []
        for depth in (int(d) for d in arguments.depths.split(",")):
            steps: list[float] = []
            reads: list[float] = []
            for _ in range(arguments.rounds):
                params = SamplingParams(max_tokens=arguments.tokens, ignore_eos=True)
                completion = engine.complete(Request(prompt=context(engine, depth), params=params))
                first = completion.time_to_first_token_s or 0.0
                steps.append((completion.seconds - first) / (arguments.tokens - 1))
                reads.append(facts.step_bytes(depth) / (read_bandwidth() * 1e9))
            rows.append(
                {
                    "depth": depth,
                    "step_s": statistics.median(steps),
                    "read_once_s": statistics.median(reads),
                    "ratio": statistics.median(steps) / statistics.median(reads),
                    "spread": {"step": spread(steps), "read_once": spread(reads)},
                    "raw_s": {"step": steps, "read_once": reads},
                }
            )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    write(
        arguments.json,
        {
            "machine": machine(),
            "dtype": facts.dtype_name,
            "weights": facts.weights,
            "kv": facts.kv,
            "peak_rss_bytes": peak,
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
