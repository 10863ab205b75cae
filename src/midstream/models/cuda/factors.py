"""Which rows of a step get which adapter's factors, as tables of addresses that kernels follow."""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from midstream.adapters.weights import LoraWeights
from midstream.models.deltas import DeltaGroup, Part

Numbers = NDArray[np.int64]

FIELDS = 4
# Adapters whose columns of a fixed table are kept though no step uses them, and with these their weights.
_KEPT = 16
_LEAST_RANK_BLOCK = 16
# Bytes that the kernels read at once, and the numbers in them.
_ALIGNMENT = 16
_RANK_STEP = 8


@dataclass(frozen=True, slots=True)
class RowOwners:
    """Rows `start` … `end` of the batch; `numbers` [end - start] has each one's adapter in the step, or -1."""

    start: int
    end: int
    numbers: Tensor


@dataclass(frozen=True, slots=True)
class ProductFactors:
    """The factors of a step's adapters for one product, which joins several linear layers.

    `table` [parts, adapters, 4]: addresses of A [rank, in] and B [out, rank], the rank, a multiple of 8 (0: none), the
    bits of the scale. `parts` [parts, 3]: number of the part, its first column, its columns; `widest`: the most columns
    of a part.
    `rank_block`: a power of two, at least 16, that no rank exceeds; 0 where no adapter has a factor. `kept` holds what
    the table points into.
    """

    table: Tensor
    parts: Tensor
    widest: int
    rank_block: int
    kept: tuple[Tensor, ...] = ()


def owners_of(groups: Sequence[DeltaGroup], start: int, end: int) -> Numbers:
    """The number of the group of each row from `start` to `end`, -1 for rows of the base model."""
    owners = np.full(end - start, -1, np.int64)
    for number, group in enumerate(groups):
        owners[group.start - start : group.end - start] = number
    return owners


def row_owners(groups: Sequence[DeltaGroup], device: torch.device) -> RowOwners:
    """Of groups that stand one after the other in the batch."""
    start, end = groups[0].start, groups[-1].end
    return RowOwners(start, end, torch.from_numpy(owners_of(groups, start, end)).to(device))


def product_factors(groups: Sequence[DeltaGroup], parts: Sequence[Part], device: torch.device) -> ProductFactors:
    """The factors that a step's adapters have for one product."""
    columns = [_column(group.weights, [part.path for part in parts]) for group in groups]
    table = np.stack([column.numbers for column in columns], axis=1)
    kept = tuple(tensor for column in columns for tensor in column.kept)
    return ProductFactors(
        torch.from_numpy(table).to(device),
        torch.from_numpy(_part_numbers(parts)).to(device),
        max(part.out for part in parts),
        max(column.rank_block for column in columns),
        kept,
    )


class FixedFactors:
    """The factors of all products of a model in one table that stays where it is, for `adapters` adapters at a time.

    A recorded step reads it, so what is filled in decides whose deltas it adds.
    """

    def __init__(self, products: Iterable[Sequence[Part]], adapters: int, device: torch.device) -> None:
        self._products = {parts[0].path: tuple(parts) for parts in products}
        self._paths = [part.path for parts in self._products.values() for part in parts]
        self._adapters = adapters
        self._table = torch.zeros(len(self._paths), adapters, FIELDS, dtype=torch.int64, device=device)
        self._parts = {
            path: torch.from_numpy(_part_numbers(parts)).to(device) for path, parts in self._products.items()
        }
        self._columns: OrderedDict[str, _Column] = OrderedDict()
        self._filled: tuple[_Column, ...] = ()

    def products(self, rank_block: int) -> dict[str, ProductFactors]:
        """Views of the table by the path of a product's first part, for ranks up to `rank_block`."""
        found: dict[str, ProductFactors] = {}
        first = 0
        for path, parts in self._products.items():
            table = self._table[first : first + len(parts)]
            found[path] = ProductFactors(table, self._parts[path], max(part.out for part in parts), rank_block)
            first += len(parts)
        return found

    def rank_block(self, groups: Sequence[DeltaGroup]) -> int:
        """What `products` needs for these adapters; 0 for none."""
        return max((self._column_of(group).rank_block for group in groups), default=0)

    def fill(self, groups: Sequence[DeltaGroup]) -> None:
        """Put the adapters of a step into the table, in their order."""
        columns = tuple(self._column_of(group) for group in groups)
        if len(columns) == len(self._filled) and all(map(_same, columns, self._filled)):
            return
        table = np.zeros((len(self._paths), self._adapters, FIELDS), np.int64)
        for number, column in enumerate(columns):
            table[:, number] = column.numbers
        self._table.copy_(torch.from_numpy(table))
        self._filled = columns

    def _column_of(self, group: DeltaGroup) -> _Column:
        found = self._columns.get(group.digest)
        # The same digest with other tensors: taken out and loaded again, so the old addresses may be others' by now.
        if found is None or found.weights is not group.weights:
            found = self._columns[group.digest] = _column(group.weights, self._paths)
        self._columns.move_to_end(group.digest)
        while len(self._columns) > _KEPT:
            self._columns.popitem(last=False)
        return found


@dataclass(frozen=True, slots=True, eq=False)
class _Column:
    """One adapter's numbers [paths, 4]. `weights` and `kept` are what they point into."""

    numbers: Numbers
    rank_block: int
    weights: Mapping[str, LoraWeights]
    kept: tuple[Tensor, ...]


def _column(weights: Mapping[str, LoraWeights], paths: Sequence[str]) -> _Column:
    numbers = np.zeros((len(paths), FIELDS), np.int64)
    kept: list[Tensor] = []
    largest = 0
    for place, path in enumerate(paths):
        factor = weights.get(path)
        if factor is None:
            continue
        a, b = _readable(factor)
        kept += [a, b]
        largest = max(largest, a.shape[0])
        numbers[place] = a.data_ptr(), b.data_ptr(), a.shape[0], _bits(factor.scale)
    return _Column(numbers, _rank_block(largest), weights, tuple(kept))


def _readable(factor: LoraWeights) -> tuple[Tensor, Tensor]:
    """A and B as kernels read them, 16 bytes at a time: copies, where they lie or end otherwise."""
    a, b = factor.a, factor.b
    missing = -a.shape[0] % _RANK_STEP
    if missing:
        a, b = F.pad(a, (0, 0, 0, missing)), F.pad(b, (0, missing))
    return _aligned(a), _aligned(b)


def _aligned(matrix: Tensor) -> Tensor:
    matrix = matrix.contiguous()
    return matrix if matrix.data_ptr() % _ALIGNMENT == 0 else matrix.clone()


def _rank_block(rank: int) -> int:
    return max(_LEAST_RANK_BLOCK, 1 << (rank - 1).bit_length()) if rank else 0


def _part_numbers(parts: Sequence[Part]) -> Numbers:
    return np.array([(number, part.offset, part.out) for number, part in enumerate(parts)], np.int64)


def _same(one: _Column, other: _Column) -> bool:
    return one is other


def _bits(scale: float) -> int:
    """A float64 as the integer of the same bits."""
    return int(struct.unpack("<q", struct.pack("<d", scale))[0])
