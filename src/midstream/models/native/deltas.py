"""The adapters' factors as the kernels read them, kept as long as the adapters' weights are."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional as F

from midstream.adapters.weights import LoraWeights
from midstream.models.deltas import DeltaGroup, Part
from midstream.models.native import structs
from midstream.models.native.pack import depth_step, panels


class AdapterFactors:
    """One adapter's factors of some products, each of several linear layers. `width`: of the widest product's A x.

    They lie one behind the other in the order of their use, as the kernels ask for what lies behind what they read; the
    factors A of one product side by side, so that small ranks fill panels together.
    """

    def __init__(self, weights: Mapping[str, LoraWeights], products: Sequence[Sequence[Part]], columns: int) -> None:
        self._columns = columns
        self._packed: list[Tensor] = []
        self._size = 0  # of the packed ones, in bytes
        self._kept: list[object] = []  # the table points into these
        found = [self._product(weights, parts) for parts in products]
        memory = torch.cat(self._packed) if self._packed else torch.empty(0)
        self._packed = []
        self._kept.append(memory)
        self.width = max((factors.width for factors, _ in found), default=0)
        self.table = (structs.Factors * len(products))(*(self._placed(*each, memory) for each in found))

    def _product(
        self, weights: Mapping[str, LoraWeights], parts: Sequence[Part]
    ) -> tuple[structs.Factors, list[structs.Factor]]:
        """Its factors, which lie at offsets from where the memory will be."""
        adapted = [(weights[part.path], part) for part in parts if part.path in weights]
        padded = [_padded(each) for each, _ in adapted]
        joined = self._pack(torch.cat([a for a, _ in padded])) if padded else 0
        found: list[structs.Factor] = []
        down = 0
        for (each, part), (a, b) in zip(adapted, padded, strict=True):
            found.append(structs.Factor(self._pack(b), len(a), part.out, part.offset, down, each.scale))
            down += len(a)
        return structs.Factors(joined, down, None, len(found)), found

    def _pack(self, factor: Tensor) -> int:
        packed = panels(factor, factor.dtype, self._columns).flatten()
        self._packed.append(packed)
        offset, self._size = self._size, self._size + packed.nbytes
        return offset

    def _placed(self, factors: structs.Factors, found: Sequence[structs.Factor], memory: Tensor) -> structs.Factors:
        for factor in found:
            factor.b = memory.data_ptr() + (factor.b or 0)
        each = (structs.Factor * len(found))(*found)
        self._kept.append(each)
        factors.a = memory.data_ptr() + (factors.a or 0)
        factors.first = ctypes.addressof(each)
        return factors


def _padded(weights: LoraWeights) -> tuple[Tensor, Tensor]:
    """A [depth, in] and B [out, depth] with the rank made what a step in depth wants."""
    padding = -weights.a.shape[0] % depth_step(weights.a.dtype)
    return F.pad(weights.a, (0, 0, 0, padding)), F.pad(weights.b, (0, padding))


class FactorTables:
    """The factors of every adapter that was met, for the same products.

    An adapter is known by the first of its weights: they live as long as it does.
    """

    def __init__(self, products: Sequence[Sequence[Part]], columns: int) -> None:
        """`columns`: of a panel."""
        self._products = products
        self._columns = columns
        self._adapters: WeakKeyDictionary[LoraWeights, AdapterFactors] = WeakKeyDictionary()

    def of(self, weights: Mapping[str, LoraWeights]) -> AdapterFactors:
        key = next(iter(weights.values()))
        if key not in self._adapters:
            self._adapters[key] = AdapterFactors(weights, self._products, self._columns)
        return self._adapters[key]


class StepDeltas:
    """The adapters of one step. `deltas` is what the kernels get of them."""

    def __init__(self, tables: FactorTables, groups: Sequence[DeltaGroup], dtype: torch.dtype) -> None:
        self._adapters = [tables.of(group.weights) for group in groups]
        found = zip(groups, self._adapters, strict=True)
        owned = [structs.Owned(group.start, group.end, ctypes.addressof(a.table)) for group, a in found]
        self._owned = (structs.Owned * len(owned))(*owned)
        width = max(adapter.width for adapter in self._adapters)
        self._down: Tensor = torch.empty(sum(group.count for group in groups), max(width, 1), dtype=dtype)
        self.deltas = structs.Deltas(ctypes.addressof(self._owned), self._down.data_ptr(), len(owned), width)
