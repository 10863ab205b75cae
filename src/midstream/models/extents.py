"""Attention of few rows to ranges of the pool, laid out for a kernel that reads them where they lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Keys of a chunk: the unit of work, small enough that few KV heads keep all cores busy.
_CHUNK = 256
_MOST_CHUNKS = 64


class Rows(NamedTuple):
    """Rows of the batch: a slice where they are contiguous, else an index tensor."""

    selector: slice | Tensor
    total: int


def rows_of(numbers: Sequence[int], device: torch.device) -> Rows:
    """`numbers` ascend."""
    if numbers[-1] - numbers[0] + 1 == len(numbers):
        return Rows(slice(numbers[0], numbers[-1] + 1), len(numbers))
    return Rows(torch.tensor(numbers, dtype=torch.long, device=device), len(numbers))


@dataclass(slots=True)
class ExtentCall:
    """Rows, and the chunks of ranges that they see.

    `chunks` [n, 6]: start, length, first of its `chunk_rows`, how many, whether causal, first of its partial results.
    In a causal chunk, row i of n sees all but the last n - 1 - i keys. Row r of the call merges the partial results
    `merge_partial[merge_first[r] : merge_first[r + 1]]`. All tensors are of int64, on the CPU.
    """

    rows: Rows
    chunks: Tensor
    chunk_rows: Tensor
    merge_first: Tensor
    merge_partial: Tensor
    num_partials: int
    # What a kernel keeps for the layers of a step.
    prepared: dict[Any, Any] = field(default_factory=dict)


class ExtentBuilder:
    """Collects the ranges of a call."""

    def __init__(self) -> None:
        self._chunks: list[tuple[int, int, int, int, int, int]] = []
        self._chunk_rows: list[int] = []
        self._partials: dict[int, list[int]] = {}
        self._num_partials = 0

    def add(self, start: int, length: int, rows: Sequence[int], *, causal: bool = False) -> None:
        """Slots from `start` on, seen by `rows` of the batch: in full, or causally as their own KV."""
        # A causal chunk is not cut: it is short.
        size = length if causal else max(_CHUNK, -(-length // _MOST_CHUNKS))
        first = len(self._chunk_rows)
        self._chunk_rows.extend(rows)
        for at in range(0, length, size):
            piece = min(size, length - at)
            self._chunks.append((start + at, piece, first, len(rows), int(causal), self._num_partials))
            for place, row in enumerate(rows):
                self._partials.setdefault(row, []).append(self._num_partials + place)
            self._num_partials += len(rows)

    def call(self) -> ExtentCall | None:
        """None when nothing was added."""
        if not self._chunks:
            return None
        numbers = sorted(self._partials)
        first = [0]
        for row in numbers:
            first.append(first[-1] + len(self._partials[row]))
        return ExtentCall(
            rows=rows_of(numbers, torch.device("cpu")),
            chunks=torch.tensor(self._chunks),
            chunk_rows=torch.tensor(self._chunk_rows),
            merge_first=torch.tensor(first),
            merge_partial=torch.tensor([p for row in numbers for p in self._partials[row]]),
            num_partials=self._num_partials,
        )
