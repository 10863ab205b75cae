"""The compiled kernels behind the interface that the model's layers use."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
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
from midstream.models.products import Held, Product, TorchProduct, WeightKind, quantized

_NUMBERS = {torch.float32: "float", torch.bfloat16: "bf16"}
HEAD_DIMS = (32, 64, 96, 128, 256)


class NativeKernels(TorchKernels):
    """For models of one type, float32 or bfloat16, on a CPU; what they do not serve goes to torch's own.

    `dims`: the sizes of heads whose attention the library has.
    """

    def __init__(self, library: ctypes.PyDLL, dtype: torch.dtype, dims: Sequence[int]) -> None:
        self._library = library
        self._dtype = dtype
        self._dims = frozenset(dims)
        self._attend = library.midstream_attend
        self._add_norm = library.midstream_add_norm
        self._rotate = library.midstream_rotate
        self._gated = library.midstream_gated
        self._gated.argtypes = (ctypes.c_void_p, ctypes.c_void_p, *(ctypes.c_int64,) * 2, ctypes.c_int32)
        self._add_deltas = library.midstream_add_deltas
        self._add_deltas.argtypes = (*(ctypes.c_void_p,) * 4, ctypes.c_int32)
        self._tables: dict[tuple[Part, ...], FactorTables] = {}

    def supports(self, dim: int) -> bool:
        return dim in self._dims

    def product(self, weight: Tensor, bias: Tensor | None, kind: WeightKind | None, *, wide: bool = False) -> Product:
        if weight.dtype != self._dtype or not self._packs(weight.shape[1]):
            return super().product(weight, bias, kind, wide=wide)
        return self._packed(Held(weight if kind is None else quantized(weight), bias, wide))

    def repacked(self, product: Product) -> Product:
        if not isinstance(product, TorchProduct) or product.dtype != self._dtype:
            return product
        return self._packed(product.held()) if self._packs(product.in_features) else product

    def _packs(self, depth: int) -> bool:
        """Whether products of this depth are worth it on this processor."""
        return depth % depth_step(self._dtype) == 0 and bool(self._library.midstream_has_products())

    def _packed(self, held: Held) -> PackedProduct:
        return PackedProduct(self._library, self._dtype, held)

    def stack(self, layers: Sequence[Any]) -> StackRun | None:
        return NativeStack(self._library, self._dtype, layers) if can_stack(layers) else None

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if x.dtype != self._dtype:
            return super().norm(x, weight, eps)
        return self._norm(x, None, 0.0, weight, eps)

    def add_norm(self, x: Tensor, update: Tensor, alpha: float, weight: Tensor, eps: float) -> Tensor:
        if x.dtype != self._dtype:
            return super().add_norm(x, update, alpha, weight, eps)
        return self._norm(x, update, alpha, weight, eps)

    def _norm(self, x: Tensor, update: Tensor | None, alpha: float, weight: Tensor, eps: float) -> Tensor:
        out = torch.empty_like(x)
        added = None if update is None else update.data_ptr()
        rows, dim = x.shape
        norm = structs.Norm(x.data_ptr(), added, weight.data_ptr(), out.data_ptr(), rows, dim, alpha, eps)
        self._add_norm(byref(norm), torch.get_num_threads())
        return out

    def rotate(self, qkv: Tensor, cosine: Tensor, sine: Tensor, kv: LayerKV, slots: Tensor) -> Tensor:
        kv_heads, num_slots, dim = kv.keys.shape
        if dim not in HEAD_DIMS or qkv.dtype != self._dtype:
            return super().rotate(qkv, cosine, sine, kv, slots)
        rows = qkv.shape[0]
        heads = qkv.shape[1] // dim - 2 * kv_heads
        query = qkv.new_empty(heads, rows, dim)
        sizes = rows, heads, kv_heads, dim, num_slots
        inputs = (qkv.data_ptr(), cosine.data_ptr(), sine.data_ptr())
        rotary = structs.Rotary(*inputs, query.data_ptr(), kv_addresses(kv), slots.data_ptr(), *sizes)
        self._rotate(byref(rotary), torch.get_num_threads())
        return query

    def gated(self, both: Tensor) -> Tensor:
        if both.dtype != self._dtype:
            return super().gated(both)
        rows, width = both.shape[0], both.shape[1] // 2
        out = both.new_empty(rows, width)
        self._gated(both.data_ptr(), out.data_ptr(), rows, width, torch.get_num_threads())
        return out

    def attend(self, query: Tensor, kv: LayerKV, call: ExtentCall, scale: float) -> Tensor:
        query = query.contiguous()  # transformers' own layers give it as a transposed view
        heads, rows, dim = query.shape
        if query.dtype != self._dtype:
            raise RuntimeError(f"kernels for {self._dtype} do not attend in {query.dtype}")
        arguments = extent_arguments(call, kv.keys, heads, rows, scale)
        out = query.new_empty(rows, heads, dim)
        arguments.query, arguments.out, arguments.kv = query.data_ptr(), out.data_ptr(), kv_addresses(kv)
        if not self._attend(byref(arguments)):
            raise RuntimeError(f"no attention kernel for heads of {dim}")
        return out

    def add_deltas(self, x: Tensor, y: Tensor, context: DeltaContext, parts: Sequence[Part]) -> bool:
        if x.dtype != self._dtype or x.shape[1] % depth_step(x.dtype):
            return False
        # By all parts: models of one family have layers of the same names, joined in one and not in another.
        key = tuple(parts)
        if key not in self._tables:
            self._tables[key] = FactorTables([key], self._library.midstream_panel())
        step = StepDeltas(self._tables[key], context.groups, x.dtype)
        x = x.contiguous()
        sizes = structs.Weight(None, None, None, x.shape[1], y.shape[1], 0)
        pointers = byref(step.deltas), byref(sizes), x.data_ptr(), y.data_ptr()
        self._add_deltas(*pointers, torch.get_num_threads())
        return True


_started: dict[tuple[torch.dtype, tuple[int, ...]], Future[Kernels]] = {}
_starting = threading.Lock()


def start_kernels(dtype: torch.dtype, device: torch.device, dims: Iterable[int]) -> Future[Kernels]:
    """The compiled kernels for heads of these sizes where they can be had for this type and device, else torch's own.

    Done at once where nothing has to be compiled; else a process compiles meanwhile. Once for all who ask.
    """
    if device.type != "cpu" or dtype not in _NUMBERS:
        return _done(TorchKernels())
    key = (dtype, tuple(sorted(set(HEAD_DIMS).intersection(dims))))
    with _starting:
        if key not in _started:
            _started[key] = _begun(*key)
        return _started[key]


def _done(kernels: Kernels) -> Future[Kernels]:
    future: Future[Kernels] = Future()
    future.set_result(kernels)
    return future


def _begun(dtype: torch.dtype, dims: tuple[int, ...]) -> Future[Kernels]:
    future: Future[Kernels] = Future()

    def work() -> None:
        try:
            library = compiled(_NUMBERS[dtype], dims)
            future.set_result(TorchKernels() if library is None else NativeKernels(library, dtype, dims))
        except BaseException as error:  # whoever waits is told, whatever it is
            future.set_exception(error)

    # A daemon, as a process that ends does not wait for a compiler.
    threading.Thread(target=work, name="midstream-compile", daemon=True).start()
    return future
