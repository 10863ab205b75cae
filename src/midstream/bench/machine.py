"""The machine, and what it can do in this very run."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

from midstream.bench.figures import timed
from midstream.engine.apart import apart

CPU = torch.device("cpu")
# Far more than caches hold, and enough that a GPU is not waiting for its next kernel.
_READ_BYTES = {"cpu": 256 * 1024**2, "cuda": 2 * 1024**3}
_MATRIX_SIZE = {"cpu": 1024, "cuda": 8192}
# Share of the cores that others may keep busy before figures are told to be doubtful.
_BUSY_SHARE = 0.25


def machine(device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The processor, and what `device` can do now: GB/s of reading its memory, GFLOP/s of products of this type."""
    found: dict[str, Any] = {"processor": _processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return {
        **found,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "read_gb_per_s": round(read_bandwidth(device), 1),
        f"gflop_per_s_{str(dtype).removeprefix('torch.')}": round(matrix_throughput(dtype, device), 1),
        "load_average": load_average(),
    }


def load_average() -> float:
    """Processes that wanted a core, averaged over the last minute."""
    return round(os.getloadavg()[0], 2)


def read_bandwidth(device: torch.device = CPU) -> float:
    """GB/s of reading a device's memory once: the best of several sums over more than its caches hold."""

    def measured() -> float:
        data = torch.ones(_READ_BYTES[device.type] // 4, device=device)
        return data.nbytes / min(timed(lambda: data.sum().item()) for _ in range(6)) / 1e9

    return apart(measured)  # a team of this thread's own would slow the engine's steps


def matrix_throughput(dtype: torch.dtype, device: torch.device = CPU) -> float:
    """GFLOP/s of a large matrix product: the best of several."""
    size = _MATRIX_SIZE[device.type]

    def measured() -> float:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        # Reading one element waits until a GPU is done.
        return 2 * size**3 / min(timed(lambda: (a @ b)[0, 0].item()) for _ in range(5)) / 1e9

    return apart(measured)


def busy_warnings(before: float, after: float, *, cores: int, threads: int) -> list[str]:
    """Reasons to doubt figures: load averages before and after the run that are not the run's own."""
    found: list[str] = []
    if before > _BUSY_SHARE * cores:
        found.append(f"the machine was busy before: load average {before:.2f} on {cores} cores; times are too long")
    if after > threads + _BUSY_SHARE * cores:
        found.append(
            f"the machine was busy during the run: load average {after:.2f}, where midstream alone makes {threads} at "
            "most; times are too long"
        )
    return found


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        if names:
            return names[0]
    return platform.processor() or "unknown"
