"""What the benchmarks share: the machine, its own limits, contexts of real text, and adapters."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from midstream.engine.apart import apart
from midstream.library import library_folder
from midstream.session import Engine


def machine() -> dict[str, Any]:
    """The processor, and what it can do in this very run."""
    model = platform.processor() or "unknown"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "read_gb_per_s": round(read_bandwidth(), 1),
        "gflop_per_s_float32": round(matrix_throughput(torch.float32), 1),
        "load_average": round(os.getloadavg()[0], 2),
    }


def read_bandwidth() -> float:
    """GB/s of reading memory once: the best of several sums over 256 MB."""

    def measured() -> float:
        data = torch.ones(64 * 1024 * 1024)
        return data.nbytes / min(timed(data.sum) for _ in range(6)) / 1e9

    return apart(measured)  # a team of this thread's own would slow the engine's steps


def matrix_throughput(dtype: torch.dtype) -> float:
    """GFLOP/s of a large matrix product: the best of several."""

    def measured() -> float:
        a, b = torch.randn(1024, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
        return 2 * 1024**3 / min(timed(lambda: a @ b) for _ in range(5)) / 1e9

    return apart(measured)


def timed(function: Callable[[], Any]) -> float:
    """Wall seconds of one call."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    if len(values) < 2:
        return {"median": values[0], "q1": values[0], "q3": values[0]}
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "q1": low, "q3": high}


def interval(values: NDArray[np.float64]) -> dict[str, float]:
    """Mean with its 95 % interval: percentiles of 10,000 bootstrap samples."""
    draws = values[np.random.default_rng(0).integers(0, len(values), (10_000, len(values)))].mean(axis=1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return {"value": float(values.mean()), "low": float(low), "high": float(high)}


def context(engine: Engine, tokens: int) -> tuple[int, ...]:
    """A conversation of exactly that many tokens, made of the demo's passages, and ending with a closed turn."""
    content = json.loads((files("midstream") / "data" / "demo_chat.json").read_text(encoding="utf-8"))
    passages = "\n\n".join(d["text"] for turn in content["turns"] for d in turn["documents"])
    chat = engine.aio.chat
    head, tail = chat.encode("<|im_start|>user\n"), chat.encode("<|im_end|>\n")
    body = chat.encode(passages)
    room = tokens - len(head) - len(tail)
    repeated = body * (room // len(body) + 1)
    return (*head, *repeated[:room], *tail)


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
