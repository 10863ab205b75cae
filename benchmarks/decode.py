"""One stream's decode step beside the time to read the model's weights once, and the process's peak memory."""

from __future__ import annotations

import argparse
import resource
import statistics
from pathlib import Path

from benchmarks.common import context, machine, read_bandwidth, spread, write
from midstream.session import Engine
from midstream.types import Request, SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depths", default="16,2048,4096")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with Engine.load(dtype=arguments.dtype) as engine:
        loaded = engine.aio._loaded
        parameters = sum(p.numel() for p in {id(p): p for p in loaded.model.parameters()}.values())
        packed = sum(
            m.in_features * m.out_features for m in loaded.model.modules() if getattr(m, "packed", None) is not None
        )
        tied = getattr(loaded.model.config, "tie_word_embeddings", False)
        # A step reads every weight but the embedding table, of which it reads one row; a tied head reads it whole.
        head = loaded.vocab_size * loaded.model.config.hidden_size
        weights = packed if packed else parameters - (0 if tied else head)
        rows = []
        for depth in (int(d) for d in arguments.depths.split(",")):
            steps: list[float] = []
            reads: list[float] = []
            for _ in range(arguments.rounds):
                params = SamplingParams(max_tokens=arguments.tokens, ignore_eos=True)
                completion = engine.complete(Request(prompt=context(engine, depth), params=params))
                first = completion.time_to_first_token_s or 0.0
                steps.append((completion.seconds - first) / (arguments.tokens - 1))
                reads.append(weights * loaded.dtype.itemsize / (read_bandwidth() * 1e9))
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
        dtype = str(loaded.dtype).removeprefix("torch.")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    write(arguments.json, {"machine": machine(), "dtype": dtype, "peak_rss_bytes": peak, "rows": rows})


if __name__ == "__main__":
    main()
