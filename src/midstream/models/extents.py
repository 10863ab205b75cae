"""Attention to ranges of the pool, laid out for a kernel that reads them where they lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Keys of a chunk: the unit of work, small enough that few KV heads keep all cores busy. Where many rows see it, their
# partial results would else cost as much as they save.
_CHUNK = 256
_CHUNK_OF_MANY = 512
_MANY_ROWS = 8
_MOST_CHUNKS = 64


class Span(NamedTuple):
    """Slots `start` … `start + length`, with the keys at positions from `position` on."""

    start: int
    length: int
    position: int


@dataclass(slots=True)
class ExtentCall:
    """The rows of a step and what they see, by chunks of ranges or by blocks of rows; each row by one of the two.

    `chunks` [n, 6]: start, length, first of its `chunk_rows`, how many, whether causal, first of its partial results.
    In a causal chunk, row i of n sees all but the last n - 1 - i keys. Row `merge_rows[r]` of the batch merges the
    partial results `merge_partial[merge_first[r] : merge_first[r + 1]]`.

    `blocks` [n, 5]: first row of the batch, how many, position of the first, first of its `spans` [m, 3], how many. A
    row at position p sees the keys of its block's spans at positions up to p; from p - window + 1 on, if not None.

    All tensors are of int64, on the CPU.
    """

    chunks: Tensor
    chunk_rows: Tensor
    merge_rows: Tensor
    merge_first: Tensor
    merge_partial: Tensor
    num_partials: int
    blocks: Tensor
    spans: Tensor
    window: int | None
    # What a kernel keeps for the layers of a step.
    prepared: dict[Any, Any] = field(default_factory=dict)

    @property
    def num_block_rows(self) -> int:
        return int(self.blocks[:, 1].sum())

    def cut(self, rows: int) -> Tensor:
        """`blocks` in pieces of at most `rows` rows. Those at the last positions, which see most, come first."""
        if not len(self.blocks):
            return self.blocks
        pieces: list[tuple[int, ...]] = []
        for row, count, position, *spans in self.blocks.tolist():
            pieces += [(row + at, min(rows, count - at), position + at, *spans) for at in range(0, count, rows)]
        return _table(sorted(pieces, key=lambda piece: -piece[2]), 5)


class ExtentBuilder:
    """Collects what a call's rows see."""

    def __init__(self, window: int | None = None) -> None:
        self._window = window
        self._chunks: list[tuple[int, ...]] = []
        self._chunk_rows: list[int] = []
        self._partials: dict[int, list[int]] = {}
        self._num_partials = 0
        self._blocks: list[tuple[int, ...]] = []
        self._spans: list[Span] = []

    def add(self, start: int, length: int, rows: Sequence[int], *, causal: bool = False) -> None:
        """Slots from `start` on, seen by `rows` of the batch: in full, or causally as their own KV."""
        # A causal chunk is not cut: it is short.
        least = _CHUNK if len(rows) < _MANY_ROWS else _CHUNK_OF_MANY
        size = length if causal else max(least, -(-length // _MOST_CHUNKS))
        first = len(self._chunk_rows)
        self._chunk_rows.extend(rows)
        for at in range(0, length, size):
            piece = min(size, length - at)
            self._chunks.append((start + at, piece, first, len(rows), int(causal), self._num_partials))
            for place, row in enumerate(rows):
                self._partials.setdefault(row, []).append(self._num_partials + place)
            self._num_partials += len(rows)

    def add_block(self, row: int, count: int, position: int, spans: Sequence[Span]) -> None:
        """`count` rows from `row` on, at positions from `position` on, and all that they see: their own KV as well."""
        self._blocks.append((row, count, position, len(self._spans), len(spans)))
        self._spans.extend(spans)

    def call(self) -> ExtentCall:
        numbers = sorted(self._partials)
        first = [0]
        for row in numbers:
            first.append(first[-1] + len(self._partials[row]))
        chunks, blocks, spans = (list(chain.from_iterable(t)) for t in (self._chunks, self._blocks, self._spans))
        partials = [p for row in numbers for p in self._partials[row]]
        # One tensor, cut: making seven takes a step of one row longer than attending does.
        lists = (chunks, self._chunk_rows, numbers, first, partials, blocks, spans)
        whole = torch.tensor(list(chain.from_iterable(lists)), dtype=torch.long)
        parts = whole.split([len(numbers) for numbers in lists])
        return ExtentCall(
            chunks=parts[0].view(-1, 6),
            chunk_rows=parts[1],
            merge_rows=parts[2],
            merge_first=parts[3],
            merge_partial=parts[4],
            num_partials=self._num_partials,
            blocks=parts[5].view(-1, 5),
            spans=parts[6].view(-1, 3),
            window=self._window,
        )


def _table(rows: Sequence[tuple[int, ...]], width: int) -> Tensor:
    return torch.tensor(rows, dtype=torch.long).reshape(len(rows), width)
