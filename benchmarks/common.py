"""What the benchmarks share: the machine, its own limits, contexts of real text, and adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from midstream.bench.contexts import conversation
from midstream.bench.figures import spread, timed
from midstream.bench.machine import machine, matrix_throughput, read_bandwidth
from midstream.library import library_folder
from midstream.session import Engine

__all__ = [
    "context",
    "interval",
    "load_variants",
    "machine",
    "matrix_throughput",
    "read_bandwidth",
    "spread",
    "timed",
    "write",
]


def interval(values: NDArray[np.float64]) -> dict[str, float]:
    """Mean with its 95 % interval: percentiles of 10,000 bootstrap samples."""
    draws = values[np.random.default_rng(0).integers(0, len(values), (10_000, len(values)))].mean(axis=1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return {"value": float(values.mean()), "low": float(low), "high": float(high)}


def context(engine: Engine, tokens: int) -> tuple[int, ...]:
    """A conversation of exactly that many tokens, which ends with a closed turn."""
    return conversation(engine.aio.chat, tokens)


def load_variants(engine: Engine, count: int, folder: Path, name: str = "jailbreak") -> list[str]:
    """`count` different adapters of one size: the library's, its weights scaled, each its own owner of KV."""
    root = library_folder(engine.aio.model_name)
    if root is None:
        raise SystemExit("run from a checkout: the benchmark needs library/")
    names: list[str] = []
    for number in range(count):
        copy = folder / f"{name}{number}"
        copy.mkdir()
        for file in (root / name).iterdir():
            if file.suffix in (".json", ".yaml"):
                (copy / file.name).write_bytes(file.read_bytes())
        weights = load_file(root / name / "adapter_model.safetensors")
        save_file({k: v * (1 - number / 100) for k, v in weights.items()}, copy / "adapter_model.safetensors")
        names.append(engine.load_adapter(copy).name)
    return names


def write(path: Path | None, report: dict[str, Any]) -> None:
    """Print a report, and keep it."""
    text = json.dumps(report, indent=2)
    print(text)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
