"""The first call of an adapter on a conversation that the base model has just answered: plain LoRA against aLoRA.

Per round and context, interleaved: the aLoRA call on the base model's cache, the same call by the LoRA twin (which
can reuse nothing), and the base model's own prefill of all n + m tokens and of the m last ones. Their ratio is the
bound: the most that any engine with these kernels could gain.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from benchmarks.common import context, load_pair, machine, spread, timed, write
from midstream.session import Engine
from midstream.types import Choice, Request, SamplingParams

LABEL = SamplingParams(max_tokens=8, constraint=Choice(options=('"yes"', '"no"')))
FREE = SamplingParams(max_tokens=16, ignore_eos=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contexts", default="512,1024,2048,4096")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with Engine.load(dtype=arguments.dtype) as engine:
        names = load_pair(engine)
        lengths = [int(n) for n in arguments.contexts.split(",")]
        measure(engine, names, min(lengths), 1)  # first use of every kernel
        rows = [measure(engine, names, n, arguments.rounds) for n in lengths]
    write(arguments.json, {"machine": machine(), "dtype": arguments.dtype or "default", "rows": rows})


def measure(engine: Engine, names: tuple[str, str], tokens: int, rounds: int) -> dict[str, Any]:
    """One row: medians over the rounds, with all raw seconds."""
    conversation = context(engine, tokens)
    times: dict[str, list[float]] = {}
    for _ in range(rounds):
        for kind, params in (("label", LABEL), ("free", FREE)):
            for key, seconds in one_round(engine, names, conversation, params).items():
                times.setdefault(f"{kind}_{key}", []).append(seconds)
    middle = {key: statistics.median(values) for key, values in times.items()}
    decode = max(0.0, (middle["free_alora"] - middle["label_alora"]) / (FREE.max_tokens - 1))
    rest = (FREE.max_tokens - 1) * decode
    return {
        "context": tokens,
        "lora_s": middle["label_lora"],
        "alora_s": middle["label_alora"],
        "ratio": middle["label_lora"] / middle["label_alora"],
        "bound": middle["label_base_all"] / middle["label_base_last"],
        "free16": {
            "lora_s": middle["free_lora"],
            "alora_s": middle["free_alora"],
            "ratio": middle["free_lora"] / middle["free_alora"],
            "bound": (middle["label_base_all"] + rest) / (middle["label_base_last"] + rest),
        },
        "spread": {key: spread(values) for key, values in times.items()},
        "raw_s": times,
    }


def one_round(
    engine: Engine, names: tuple[str, str], conversation: tuple[int, ...], params: SamplingParams
) -> dict[str, float]:
    alora, lora = names
    info = next(info for info in engine.adapters() if info.name == alora)
    prompt = (*conversation, *info.invocation_tokens)
    times: dict[str, float] = {}
    engine.clear_cache()
    engine.portal.run(engine.aio.warm(conversation))
    times["alora"] = call(engine, prompt, alora, params, len(info.invocation_tokens))
    times["lora"] = call(engine, prompt, lora, params, len(prompt))
    engine.clear_cache()
    engine.portal.run(engine.aio.warm(conversation))
    times["base_last"] = timed(lambda: engine.portal.run(engine.aio.warm(prompt)))
    engine.clear_cache()
    times["base_all"] = timed(lambda: engine.portal.run(engine.aio.warm(prompt)))
    return times


def call(engine: Engine, prompt: tuple[int, ...], adapter: str, params: SamplingParams, computed: int) -> float:
    """Seconds of a call, seen from outside. It must have computed exactly what it claims to need."""
    request = Request(prompt=prompt, adapter=adapter, params=params)
    found = []
    seconds = timed(lambda: found.append(engine.complete(request)))
    assert found[0].usage.computed_tokens == computed, found[0].usage
    return seconds


if __name__ == "__main__":
    main()
