"""An 8B Granite of random weights on one GPU: prefill, decode step, LoRA call and aLoRA call, beside PEFT.

Per context and round, interleaved, on one device in one process: the base model reads the context (prefill), an aLoRA
gives a label behind it, a plain LoRA does, the base model decodes a few tokens, with recorded steps and with launched
ones; and PEFT does the same with the same weights. Random weights take the same time as trained ones and say nothing
of answers; that these are PEFT's is what tests/gpu is for.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import random
import statistics
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import torch
from tests.tiny import tiny_chat

from benchmarks.common import machine, spread, timed, write
from benchmarks.gpu_model import INVOCATION, SHAPES, random_granite, write_adapter
from benchmarks.gpu_peft import PeftSide
from midstream.config import EngineConfig
from midstream.engine.engine import AsyncEngine
from midstream.models.load import prepare
from midstream.models.pool import KVPool
from midstream.types import Choice, Request, SamplingParams

LABEL = SamplingParams(max_tokens=1, constraint=Choice(options=("a", "b")))
DECODED = 32
# PEFT would take an adapter called "lora" for a part of its own names.
_ADAPTERS = {"activated": True, "plain": False}


class Sides:
    """The engine and PEFT with the same weights and adapters. PEFT is None where it is left out."""

    def __init__(self, arguments: argparse.Namespace, folder: Path, longest: int) -> None:
        self.runner = asyncio.Runner()
        device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
        model = random_granite(arguments.shape, dtype, device)
        folders = {
            name: write_adapter(model, folder / name, seed=seed, alora=alora)
            for seed, (name, alora) in enumerate(_ADAPTERS.items())
        }
        self.peft = None if arguments.no_peft else PeftSide(copy.deepcopy(model), folders)
        self.vocab = model.config.vocab_size
        loaded = prepare(model, tiny_chat(), name=f"granite-{arguments.shape}-random")
        self.kernels = type(loaded.kernels).__name__
        # The base model's conversation, the LoRA's own, and room for a few tokens.
        slots = 2 * longest + 1024
        per_slot = KVPool.bytes_per_slot(loaded.kv_shapes, loaded.dtype)
        config = EngineConfig(kv_budget_bytes=slots * per_slot, max_step_tokens=arguments.step_tokens)
        self.engine = AsyncEngine(loaded, config)
        for name, path in folders.items():
            self.run(self.engine.load_adapter(path, name=name))

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.runner.run(work)

    def close(self) -> None:
        self.run(self.engine.aclose())
        self.runner.close()


def main() -> None:
    arguments = _arguments()
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    lengths = [int(n) for n in arguments.contexts.split(",")]
    report: dict[str, Any] = {
        "machine": machine(device, dtype),
        "model": {"shape": arguments.shape, **SHAPES[arguments.shape], "dtype": arguments.dtype},
        "step_tokens": arguments.step_tokens,
        "rows": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        sides = Sides(arguments, Path(folder), max(lengths) + 64)
        report["kernels"] = sides.kernels
        try:
            for tokens in lengths:
                measure(sides, tokens, 2)  # first use of every kernel, and recordings
                report["rows"].append(measure(sides, tokens, arguments.rounds))
                if device.type == "cuda":
                    report["peak_device_bytes"] = torch.cuda.max_memory_allocated(device)
                # After each row: what is measured stays, should a lease end before the longest context does.
                write(arguments.json, report)
        finally:
            sides.close()


def measure(sides: Sides, tokens: int, rounds: int) -> dict[str, Any]:
    """One row: medians over the rounds, with all raw seconds."""
    times: dict[str, list[float]] = {}
    for number in range(rounds):
        draw = random.Random(f"{tokens} {number}")
        context = tuple(draw.randrange(300) for _ in range(tokens))
        for key, seconds in {**engine_round(sides, context), **peft_round(sides, context)}.items():
            times.setdefault(key, []).append(seconds)
    middle = {key: statistics.median(values) for key, values in times.items()}
    ratios = {"lora / alora": middle["lora_call"] / middle["alora_call"]}
    if sides.peft is not None:
        ratios |= {f"peft / midstream, {key}": middle[f"peft_{key}"] / middle[key] for key in _PEFT_KEYS}
    return {
        "context": tokens,
        "seconds": middle,
        "ratios": ratios,
        "spread": {key: spread(values) for key, values in times.items()},
        "raw_s": times,
    }


_PEFT_KEYS = ("prefill", "alora_call", "lora_call", "decode_step")


def engine_round(sides: Sides, context: tuple[int, ...]) -> dict[str, float]:
    engine = sides.engine
    prompt = (*context, *INVOCATION)
    sides.run(engine.clear_cache())
    times = {"prefill": timed(lambda: sides.run(engine.warm(context)))}
    times["alora_call"] = call(sides, prompt, "activated", len(INVOCATION))
    times["lora_call"] = call(sides, prompt, "plain", len(prompt))
    times["decode_step"] = decode_step(sides, context)
    forward = engine._loop._runner._forward  # type: ignore[attr-defined]
    if hasattr(forward, "_eager"):
        engine._loop._runner._forward = forward._eager  # type: ignore[attr-defined]
        try:
            times["decode_step_launched"] = decode_step(sides, context)
        finally:
            engine._loop._runner._forward = forward  # type: ignore[attr-defined]
    return times


def call(sides: Sides, prompt: tuple[int, ...], adapter: str, computed: int) -> float:
    """Seconds of a label call, seen from outside. It must have computed exactly what it claims to need."""
    request = Request(prompt=prompt, adapter=adapter, params=LABEL)
    found = []
    seconds = timed(lambda: found.append(sides.run(sides.engine.complete(request))))
    assert found[0].usage.computed_tokens == computed, found[0].usage
    return seconds


def decode_step(sides: Sides, context: tuple[int, ...]) -> float:
    params = SamplingParams(max_tokens=DECODED, ignore_eos=True)
    answer = sides.run(sides.engine.complete(Request(prompt=context, params=params)))
    return (answer.seconds - (answer.time_to_first_token_s or 0.0)) / (DECODED - 1)


def peft_round(sides: Sides, context: tuple[int, ...]) -> dict[str, float]:
    peft = sides.peft
    if peft is None:
        return {}
    prompt = (*context, *INVOCATION)
    caches: list[Any] = []
    times = {"peft_prefill": timed(lambda: caches.append(peft.begin(context)))}
    times["peft_decode_step"] = timed(lambda: peft.decode(caches[0], context[0], DECODED)) / DECODED
    caches.clear()
    times["peft_alora_call"] = timed(lambda: peft.label(prompt, "activated"))
    times["peft_lora_call"] = timed(lambda: peft.label(prompt, "plain"))
    return times


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--contexts", default="1024,4096,16384,65536")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--step-tokens", type=int, default=4096, help="tokens of one forward at most")
    parser.add_argument("--no-peft", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments: argparse.Namespace = parser.parse_args()
    return arguments


if __name__ == "__main__":
    main()
