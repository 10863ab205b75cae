"""The compiled kernels behind the interface that the model's layers use."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from ctypes import byref
from typing import Any

import torch
from torch import Tensor

from midstream.models.deltas import DeltaContext, Part
from midstream.models.extents import ExtentCall
from midstream.models.kernels import Kernels, StackRun, TorchKernels
from midstream.models.kv import LayerKV
from midstream.models.native import structs
from midstream.models.native.attention import extent_arguments, kv_addresses
from midstream.models.native.build import compiled
from midstream.models.native.deltas import FactorTables, StepDeltas
from midstream.models.native.pack import depth_step
from midstream.models.native.products import PackedProduct
from midstream.models.native.stack import NativeStack, can_stack
from midstream.models.products import Product, WeightKind

_TYPES = {torch.float32: 0, torch.bfloat16: 1}
_HEAD_DIMS = (32, 64, 96, 128, 256)


class NativeKernels(TorchKernels):
    """For float32 and bfloat16 on a CPU; what they do not serve goes to torch's own."""

    def __init__(self, library: ctypes.PyDLL) -> None:
        self._library = library
        self._attend = library.midstream_attend
        self._add_norm = library.midstream_add_norm
        self._rotate = library.midstream_rotate
        self._gated = library.midstream_gated
        self._gated.argtypes = (ctypes.c_void_p, ctypes.c_void_p, *(ctypes.c_int64,) * 2, *(ctypes.c_int32,) * 2)
        self._add_deltas = library.midstream_add_deltas
        self._add_deltas.argtypes = (*(ctypes.c_void_p,) * 4, *(ctypes.c_int32,) * 2)
        self._tables: dict[tuple[Part, ...], FactorTables] = {}

    def supports(self, dim: int) -> bool:
        return dim in _HEAD_DIMS

    def product(self, weight: Tensor, bias: Tensor | None, kind: WeightKind | None, *, wide: bool = False) -> Product:
        code = _TYPES[weight.dtype]
        if weight.shape[1] % depth_step(weight.dtype) or not self._library.midstream_has_products(code):
            return super().product(weight, bias, kind, wide=wide)
        return PackedProduct(self._library, code, weight, bias, kind, wide=wide)

    def stack(self, layers: Sequence[Any]) -> StackRun | None:
        return NativeStack(self._library, layers) if can_stack(layers) else None

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self._norm(x, None, 0.0, weight, eps)

    def add_norm(self, x: Tensor, update: Tensor, alpha: float, weight: Tensor, eps: float) -> Tensor:
        return self._norm(x, update, alpha, weight, eps)

    def _norm(self, x: Tensor, update: Tensor | None, alpha: float, weight: Tensor, eps: float) -> Tensor:
        out = torch.empty_like(x)
        added = None if update is None else update.data_ptr()
        rows, dim = x.shape
        norm = structs.Norm(x.data_ptr(), added, weight.data_ptr(), out.data_ptr(), rows, dim, alpha, eps)
        self._add_norm(byref(norm), torch.get_num_threads(), _TYPES[x.dtype])
        return out

    def rotate(self, qkv: Tensor, cosine: Tensor, sine: Tensor, kv: LayerKV, slots: Tensor) -> Tensor:
        kv_heads, num_slots, dim = kv.keys.shape
        if dim not in _HEAD_DIMS:
            return super().rotate(qkv, cosine, sine, kv, slots)
        rows = qkv.shape[0]
        heads = qkv.shape[1] // dim - 2 * kv_heads
        query = qkv.new_empty(heads, rows, dim)
        sizes = rows, heads, kv_heads, dim, num_slots
        inputs = (qkv.data_ptr(), cosine.data_ptr(), sine.data_ptr())
        rotary = structs.Rotary(*inputs, query.data_ptr(), kv_addresses(kv), slots.data_ptr(), *sizes)
        self._rotate(byref(rotary), torch.get_num_threads(), _TYPES[qkv.dtype])
        return query

    def gated(self, both: Tensor) -> Tensor:
        rows, width = both.shape[0], both.shape[1] // 2
        out = both.new_empty(rows, width)
        self._gated(both.data_ptr(), out.data_ptr(), rows, width, torch.get_num_threads(), _TYPES[both.dtype])
        return out

    def attend(self, query: Tensor, kv: LayerKV, call: ExtentCall, scale: float) -> Tensor:
        query = query.contiguous()  # transformers' own layers give it as a transposed view
        heads, rows, dim = query.shape
        arguments = extent_arguments(call, kv.keys, heads, rows, scale)
        out = query.new_empty(rows, heads, dim)
        arguments.query, arguments.out, arguments.kv = query.data_ptr(), out.data_ptr(), kv_addresses(kv)
        if not self._attend(byref(arguments), _TYPES[query.dtype]):
            raise RuntimeError(f"no attention kernel for heads of {dim}")
        return out

    def add_deltas(self, x: Tensor, y: Tensor, context: DeltaContext, parts: Sequence[Part]) -> bool:
        if x.shape[1] % depth_step(x.dtype):
            return False
        # By all parts: models of one family have layers of the same names, joined in one and not in another.
        key = tuple(parts)
        if key not in self._tables:
            self._tables[key] = FactorTables([key], self._library.midstream_panel())
        step = StepDeltas(self._tables[key], context.groups, x.dtype)
        x = x.contiguous()
        sizes = structs.Weight(None, None, None, x.shape[1], y.shape[1], 0)
        threads, code = torch.get_num_threads(), _TYPES[x.dtype]
        self._add_deltas(byref(step.deltas), byref(sizes), x.data_ptr(), y.data_ptr(), threads, code)
        return True


@functools.cache
def _native() -> NativeKernels | None:
    library = compiled()
    return None if library is None else NativeKernels(library)


def pick_kernels(dtype: torch.dtype, device: torch.device) -> Kernels:
    """The compiled kernels where they serve this type and device and can be had, else torch's own."""
    native = _native() if device.type == "cpu" and dtype in _TYPES else None
    return native or TorchKernels()
