"""The device's programs in plain torch, from what the tables say alone; and steps to try them on."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from midstream.models.attention_plan import Range, RowSegment
from midstream.models.cuda.factors import ProductFactors
from midstream.models.cuda.kernels import CudaKernels
from midstream.models.cuda.tables import DeviceTables
from midstream.models.kernels import TorchKernels
from midstream.models.kv import LayerKV

MULTIPROCESSORS = 4


class PlainPrograms:
    """Each tile, entry and factor is followed as the programs do it, in float64."""

    def __init__(self) -> None:
        self._torch = TorchKernels()

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, tables: DeviceTables, scale: float) -> Tensor:
        heads, rows, dim = query.shape
        group = heads // keys.shape[0]
        partial = torch.full((len(tables.entries), heads, dim), float("nan"), dtype=torch.float64)
        lse = torch.full((len(tables.entries), heads), float("nan"), dtype=torch.float64)
        for _, tiles in tables.tiles:
            for first, count, low, full, high in tiles.tolist():
                for entry in range(first, first + count):
                    row, begin, end = tables.entries[entry].tolist()
                    assert low <= begin < end <= high
                    assert begin == low or full == low
                    assert end >= full
                    k, v = (t[:, begin:end].double().repeat_interleave(group, 0) for t in (keys, values))
                    scores = (query[:, row].double()[:, None] @ k.transpose(1, 2))[:, 0] * scale
                    lse[entry] = scores.logsumexp(-1)
                    partial[entry] = (scores.softmax(-1)[:, None] @ v)[:, 0]
        return self._merged(partial, lse, tables, rows).to(query.dtype)

    def _merged(self, partial: Tensor, lse: Tensor, tables: DeviceTables, rows: int) -> Tensor:
        out = torch.zeros(rows, *partial.shape[1:], dtype=torch.float64)
        first = tables.merge_first.tolist()
        for row in range(rows):
            entries = tables.merge_entries[first[row] : first[row + 1]]
            assert (tables.entries[entries, 0] == row).all()
            if len(entries):
                out[row] = (lse[entries].softmax(0)[..., None] * partial[entries]).sum(0)
        return out

    def norm(self, x: Tensor, update: Tensor | None, alpha: float, weight: Tensor, eps: float) -> Tensor:
        if update is None:
            return self._torch.norm(x, weight, eps)
        return self._torch.add_norm(x, update, alpha, weight, eps)

    def rotate(self, qkv: Tensor, cosine: Tensor, sine: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> Tensor:
        return self._torch.rotate(qkv, cosine, sine, LayerKV(keys, values), slots)

    def gated(self, both: Tensor) -> Tensor:
        return self._torch.gated(both)

    def add_deltas(self, x: Tensor, y: Tensor, owners: Tensor, factors: ProductFactors) -> None:
        assert x.shape[0] == y.shape[0] == len(owners)
        for row, owner in enumerate(owners.tolist()):
            if owner < 0:
                continue
            for part, (number, offset, out) in enumerate(factors.parts.tolist()):
                assert number == part
                a, b, rank, scale = factors.table[number, owner].tolist()
                assert rank <= factors.rank_block
                assert out <= factors.widest
                if rank:
                    low = _floats(a, rank, x.shape[1]) @ x[row]
                    y[row, offset : offset + out] += float(_double(scale)) * (_floats(b, out, rank) @ low)


class Again:
    """A recorder that calls the function again, as a replay does: only what stands in its buffers can differ."""

    def __init__(self) -> None:
        self.recorded = 0
        self.replayed = 0

    def record(self, forward: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        output = forward().clone()
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            output.copy_(forward())

        return replay, output


def plain_kernels() -> CudaKernels:
    return CudaKernels(PlainPrograms(), MULTIPROCESSORS)


def a_step() -> tuple[tuple[RowSegment, ...], int]:
    """Prefill behind two shared ranges, decode, a short call, a first token, a cold prompt: rows in all."""
    segments = (
        RowSegment(0, 40, 300, 300, (Range(0, 100, 0), Range(100, 200, 100))),
        RowSegment(40, 1, 101, 500, (Range(0, 100, 0), Range(499, 2, 100))),
        RowSegment(41, 3, 100, 600, (Range(0, 100, 0),)),
        RowSegment(44, 1, 0, 897, (Range(897, 1, 0),)),
        RowSegment(45, 9, 0, 700, ()),
    )
    return segments, 54


def seen_slots(segments: Any, window: int | None) -> dict[int, list[int]]:
    """By row: the slots that it sees, from what the segments say."""
    found: dict[int, list[int]] = {}
    for s in segments:
        ranges = [*s.seen, Range(s.slot, s.count, s.position)] if s.count > 1 else s.seen
        for i in range(s.count):
            position = s.position + i
            pairs = [(r.start + j, r.position + j) for r in ranges for j in range(r.length)]
            low = -1 if window is None else position - window
            found[s.row + i] = sorted(slot for slot, at in pairs if low < at <= position)
    return found


def _floats(address: int, *shape: int) -> Tensor:
    """float32 numbers where they lie."""
    size = int(np.prod(shape))
    return torch.from_numpy(np.ctypeslib.as_array((ctypes.c_float * size).from_address(address)).reshape(shape))


def _double(bits: int) -> float:
    return float(np.array([bits], np.int64).view(np.float64)[0])
