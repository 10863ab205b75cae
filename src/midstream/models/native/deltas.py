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
    """One adapter's factors of some products, each of several linear layers. `width`: of the widest product's A x."""

    def __init__(self, weights: Mapping[str, LoraWeights], products: Sequence[Sequence[Part]], columns: int) -> None:
        self._columns = columns
        self._kept: list[object] = []  # the table points into these
        self.width = 0
        self.table = (structs.Factors * len(products))(*(self._product(weights, parts) for parts in products))

    def _product(self, weights: Mapping[str, LoraWeights], parts: Sequence[Part]) -> structs.Factors:
        down = 0
        found: list[structs.Factor] = []
        for part in parts:
            if part.path in weights:
                found.append(self._factor(weights[part.path], part, down))
                down += found[-1].depth
        self.width = max(self.width, down)
        factors = (structs.Factor * len(found))(*found)
        self._kept.append(factors)
        return structs.Factors(ctypes.addressof(factors), len(found))

    def _factor(self, weights: LoraWeights, part: Part, down: int) -> structs.Factor:
        dtype, rank = weights.a.dtype, weights.a.shape[0]
        padding = -rank % depth_step(dtype)
        a, b = (panels(each, dtype, self._columns) for each in (weights.a, F.pad(weights.b, (0, padding))))
        self._kept += [a, b]
        return structs.Factor(a.data_ptr(), b.data_ptr(), rank + padding, part.out, part.offset, down, weights.scale)


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
