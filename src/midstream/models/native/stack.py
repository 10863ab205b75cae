"""All decoder layers of a model in one call of the compiled kernels."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from ctypes import byref
from typing import NamedTuple

import torch
from torch import Tensor

from midstream.models.deltas import DeltaContext
from midstream.models.layer import FusedLayer
from midstream.models.native import structs
from midstream.models.native.attention import extent_arguments, kv_addresses
from midstream.models.native.deltas import FactorTables, StepDeltas
from midstream.models.native.products import PackedProduct
from midstream.models.pool import ForwardPlan, KVPool


def can_stack(layers: Sequence[FusedLayer]) -> bool:
    """Whether the layers are alike, and all their products ones that the kernels compute."""
    packed = all(isinstance(linear.product, PackedProduct) for layer in layers for linear in layer.linears)
    return packed and len({_likeness(layer) for layer in layers}) == 1


def _likeness(layer: FusedLayer) -> tuple[object, ...]:
    shape = layer.shape
    sizes = tuple((linear.out_features, linear.in_features) for linear in layer.linears)
    return shape.heads, shape.kv_heads, shape.dim, layer.residual_scale, sizes


class _Kind(NamedTuple):
    """What layers' attention may differ in."""

    window: int | None
    scale: float


class NativeStack:
    """The layers of one model, on whatever pool the plan has."""

    def __init__(self, library: ctypes.PyDLL, dtype: torch.dtype, layers: Sequence[FusedLayer]) -> None:
        """`dtype`: of the numbers that the library is for."""
        self._run = library.midstream_run_layers
        self._dtype = dtype
        self._layers = tuple(layers)
        self._table = (structs.Layer * len(layers))(*map(_layer, layers))
        products = [linear.parts for layer in layers for linear in layer.linears]
        self._factors = FactorTables(products, library.midstream_panel())
        self._kinds = tuple(_Kind(layer.shape.window, layer.shape.scale) for layer in layers)
        self._distinct = frozenset(self._kinds)
        self._memory = torch.empty(0)
        self._pool: weakref.ref[KVPool] | None = None  # the memory of an engine that was closed is not kept
        self._kv = (structs.KV * 0)()

    def __call__(self, x: Tensor, positions: tuple[Tensor, Tensor], plan: ForwardPlan, context: DeltaContext) -> bool:
        if not plan.attention.extents or not x.is_contiguous() or x.dtype != self._dtype:
            return False
        self._use(plan.pool)
        rows = x.shape[0]
        cosine, sine = (part.contiguous() for part in positions)
        deltas = StepDeltas(self._factors, context.groups, x.dtype) if context.groups else None
        attention = self._attention(plan, rows)
        forward = structs.Forward(
            x.data_ptr(),
            *self._work(x),
            cosine.data_ptr(),
            sine.data_ptr(),
            plan.attention.write_slots.data_ptr(),
            ctypes.addressof(self._table),
            ctypes.addressof(self._kv),
            ctypes.addressof(attention),
            None if deltas is None else ctypes.addressof(deltas.deltas),
            *self._sizes(x, plan.pool),
            self._layers[0].residual_scale,
            torch.get_num_threads(),
        )
        self._run(byref(forward))
        return True

    def _use(self, pool: KVPool) -> None:
        if self._pool is None or self._pool() is not pool:
            self._pool = weakref.ref(pool)
            kv = [kv_addresses(pool.layers[layer.index]) for layer in self._layers]
            self._kv = (structs.KV * len(kv))(*kv)

    def _attention(self, plan: ForwardPlan, rows: int) -> ctypes.Array[ctypes.c_void_p]:
        """By layer: the address of its attention's arguments."""
        keys, heads = plan.pool.layers[self._layers[0].index].keys, self._layers[0].shape.heads
        addresses = {}
        for kind in self._distinct:
            call = plan.attention.extent_call(kind.window)
            addresses[kind] = ctypes.addressof(extent_arguments(call, keys, heads, rows, kind.scale))
        return (ctypes.c_void_p * len(self._kinds))(*[addresses[kind] for kind in self._kinds])

    def _work(self, x: Tensor) -> list[int]:
        """Addresses of the memory for what lies between the products: normed, update, qkv, query, …"""
        first, shape = self._layers[0], self._layers[0].shape
        hidden, width, attended = x.shape[1], first.down.in_features, shape.heads * shape.dim
        widths = (hidden, hidden, first.qkv.out_features, attended, attended, 2 * width, width)
        needed = x.shape[0] * sum(widths)
        if self._memory.dtype != x.dtype or self._memory.numel() < needed:
            self._memory = torch.empty(needed, dtype=x.dtype)
        addresses = [self._memory.data_ptr()]
        for wide in widths[:-1]:
            addresses.append(addresses[-1] + x.shape[0] * wide * x.element_size())
        return addresses

    def _sizes(self, x: Tensor, pool: KVPool) -> tuple[int, ...]:
        first, shape = self._layers[0], self._layers[0].shape
        rows, hidden = x.shape
        width = first.down.in_features
        return (len(self._layers), rows, hidden, shape.heads, shape.kv_heads, shape.dim, pool.num_slots, width)


def _layer(layer: FusedLayer) -> structs.Layer:
    weights = [linear.product.weight for linear in layer.linears if isinstance(linear.product, PackedProduct)]
    first, second = layer.first_norm, layer.second_norm
    return structs.Layer(first.weight.data_ptr(), second.weight.data_ptr(), *weights, first.eps, second.eps)
