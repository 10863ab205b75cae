"""The first call of an adapter on a conversation that the base model has just answered: plain LoRA against aLoRA.

Per round and context, interleaved: the aLoRA call on the base model's cache and the same call by the LoRA twin, which
can reuse nothing; and the base model's own prefill of all n + m tokens and of m tokens behind n, whose ratio is the
bound: the most that any engine with these kernels could gain.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common import context, load_variants, machine, spread, timed, write
from midstream.session import Engine
from midstream.types import Choice, Request, SamplingParams

LABEL = SamplingParams(max_tokens=8, constraint=Choice(options=('"yes"', '"no"')))
FREE = SamplingParams(max_tokens=16, ignore_eos=True)


class Names(NamedTuple):
    label_alora: str
    free_alora: str
    label_lora: str
    free_lora: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contexts", default="512,1024,2048,4096")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, Engine.load(dtype=arguments.dtype, wait_for_kernels=True) as engine:
        # Two of each: a call with another answer must be the first of its adapter too.
        names = Names(
            *load_variants(engine, 2, Path(folder)), *load_variants(engine, 2, Path(folder), "jailbreak-lora")
        )
        lengths = [int(n) for n in arguments.contexts.split(",")]
        measure(engine, names, min(lengths), 1)  # first use of every kernel
        rows = [measure(engine, names, n, arguments.rounds) for n in lengths]
    write(arguments.json, {"machine": machine(), "dtype": arguments.dtype or "default", "rows": rows})


def measure(engine: Engine, names: Names, tokens: int, rounds: int) -> dict[str, Any]:
    """One row: medians over the rounds, with all raw seconds."""
    conversation = context(engine, tokens)
    times: dict[str, list[float]] = {}
    for _ in range(rounds):
        for key, seconds in one_round(engine, names, conversation).items():
            times.setdefault(key, []).append(seconds)
    middle = {key: statistics.median(values) for key, values in times.items()}
    decode = max(0.0, (middle["free_alora"] - middle["label_alora"]) / (FREE.max_tokens - 1))
    rest = (FREE.max_tokens - 1) * decode
    return {
        "context": tokens,
        "lora_s": middle["label_lora"],
        "alora_s": middle["label_alora"],
        "ratio": middle["label_lora"] / middle["label_alora"],
        "bound": middle["base_all"] / middle["base_last"],
        "free16": {
            "lora_s": middle["free_lora"],
            "alora_s": middle["free_alora"],
            "ratio": middle["free_lora"] / middle["free_alora"],
            "bound": (middle["base_all"] + rest) / (middle["base_last"] + rest),
        },
        "spread": {key: spread(values) for key, values in times.items()},
        "raw_s": times,
    }


def one_round(engine: Engine, names: Names, conversation: tuple[int, ...]) -> dict[str, float]:
    info = next(info for info in engine.adapters() if info.name == names.label_alora)
    prompt = (*conversation, *info.invocation_tokens)
    width = len(info.invocation_tokens)
    times: dict[str, float] = {}
    engine.clear_cache()
    times["base_all"] = timed(lambda: engine.portal.run(engine.aio.warm(prompt)))
    times["label_alora"] = call(engine, prompt, names.label_alora, LABEL, width)
    times["label_lora"] = call(engine, prompt, names.label_lora, LABEL, len(prompt))
    other = (*conversation, *reversed(info.invocation_tokens))
    times["base_last"] = timed(lambda: engine.portal.run(engine.aio.warm(other)))
    times["free_alora"] = call(engine, prompt, names.free_alora, FREE, width)
    times["free_lora"] = call(engine, prompt, names.free_lora, FREE, len(prompt))
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
