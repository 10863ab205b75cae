"""The compiled kernels behind the interface that the model's layers use."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from ctypes import byref

import torch
from torch import Tensor

from midstream.models.deltas import DeltaContext, Part
from midstream.models.extents import ExtentCall
from midstream.models.kernels import Kernels, TorchKernels
from midstream.models.native import structs
from midstream.models.native.build import compiled

_TYPES = {torch.float32: 0, torch.bfloat16: 1}
_HEAD_DIMS = (32, 64, 96, 128, 256)
# More adapter rows than this and torch's blocked products win over reading the factors anew for every fourth row.
_DELTA_ROWS = 64
_MAX_RANK = 512
# Numbers that the query vectors of a block may have: QueryBlock::MOST · dim in prefill.h.
_BLOCK = 12288
# Units of work for each thread, so that none waits long for the last ones.
_UNITS = 4
_NO_WINDOW = 1 << 60


class NativeKernels(TorchKernels):
    """For float32 and bfloat16 on a CPU; what they do not serve goes to torch's own."""

    def __init__(self, library: ctypes.PyDLL) -> None:
        self._attend = library.midstream_attend
        self._add_norm = library.midstream_add_norm
        self._rotate = library.midstream_rotate
        self._gated = library.midstream_gated
        self._gated.argtypes = (ctypes.c_void_p, ctypes.c_void_p, *(ctypes.c_int64,) * 2, *(ctypes.c_int32,) * 2)
        self._add_deltas = library.midstream_add_deltas

    def supports(self, dim: int) -> bool:
        return dim in _HEAD_DIMS

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self._norm(x, None, 0.0, weight, eps)

    def add_norm(self, x: Tensor, update: Tensor, alpha: float, weight: Tensor, eps: float) -> Tensor:
        return self._norm(x, update, alpha, weight, eps)

    def _norm(self, x: Tensor, update: Tensor | None, alpha: float, weight: Tensor, eps: float) -> Tensor:
        out = torch.empty_like(x)
        added = None if update is None else update.data_ptr()
        rows, dim = x.shape
        norm = structs.Norm(
            x.data_ptr(), added, weight.data_ptr(), out.data_ptr(), rows, dim, alpha, eps, torch.get_num_threads()
        )
        self._add_norm(byref(norm), _TYPES[x.dtype])
        return out

    def rotate(self, qkv: Tensor, cosine: Tensor, sine: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> Tensor:
        kv_heads, num_slots, dim = keys.shape
        if dim not in _HEAD_DIMS:
            return super().rotate(qkv, cosine, sine, keys, values, slots)
        rows = qkv.shape[0]
        heads = qkv.shape[1] // dim - 2 * kv_heads
        query = qkv.new_empty(heads, rows, dim)
        inputs = (qkv.data_ptr(), cosine.data_ptr(), sine.data_ptr())
        outputs = (query.data_ptr(), keys.data_ptr(), values.data_ptr(), slots.data_ptr())
        rotary = structs.Rotary(*inputs, *outputs, rows, heads, kv_heads, dim, num_slots, torch.get_num_threads())
        self._rotate(byref(rotary), _TYPES[qkv.dtype])
        return query

    def gated(self, both: Tensor) -> Tensor:
        rows, width = both.shape[0], both.shape[1] // 2
        out = both.new_empty(rows, width)
        self._gated(both.data_ptr(), out.data_ptr(), rows, width, torch.get_num_threads(), _TYPES[both.dtype])
        return out

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, call: ExtentCall, scale: float) -> Tensor:
        query = query.contiguous()  # transformers' own layers give it as a transposed view
        heads, rows, dim = query.shape
        key = (heads, keys.shape, scale, torch.get_num_threads())
        prepared = call.prepared.get(key)
        if prepared is None:
            prepared = call.prepared[key] = _prepare(query, keys, call, scale)
        arguments, _ = prepared
        out = query.new_empty(rows, heads, dim)
        arguments.query, arguments.keys, arguments.values = query.data_ptr(), keys.data_ptr(), values.data_ptr()
        arguments.out = out.data_ptr()
        if not self._attend(byref(arguments), _TYPES[query.dtype]):
            raise RuntimeError(f"no attention kernel for heads of {dim}")
        return out

    def add_deltas(self, x: Tensor, y: Tensor, context: DeltaContext, parts: Sequence[Part]) -> bool:
        groups = context.groups
        if groups[-1].end - groups[0].start > _DELTA_ROWS:
            return False
        key = parts[0].path
        if key not in context.tables:
            context.tables[key] = _factors(context, parts)
        factors = context.tables[key]
        if factors is None:
            return False
        owned = context.owned.get(factors.counts)
        if owned is None:
            owned = context.owned[factors.counts] = _owned(context, factors.counts)
        x = x.contiguous()
        pointers = (x.data_ptr(), y.data_ptr(), ctypes.addressof(owned), ctypes.addressof(factors.table))
        deltas = structs.Deltas(*pointers, len(groups), x.shape[1], y.shape[1], torch.get_num_threads())
        self._add_deltas(byref(deltas), _TYPES[x.dtype])
        return True


def _prepare(query: Tensor, keys: Tensor, call: ExtentCall, scale: float) -> tuple[structs.Attention, list[Tensor]]:
    """The arguments that all layers of a step share, and the memory that they point to."""
    heads, batch_rows, dim = query.shape
    kv_heads, slots, _ = keys.shape
    threads = torch.get_num_threads()
    scratch = torch.empty(call.num_partials * heads * (dim + 2))
    blocks = call.cut(_block_rows(call.num_block_rows, heads // kv_heads, kv_heads, dim, threads))
    kept = [scratch, call.chunks, call.chunk_rows, call.merge_rows, call.merge_first, call.merge_partial]
    kept += [blocks, call.spans]
    counts = (len(call.chunks), len(call.merge_rows), len(blocks))
    shape = (batch_rows, slots, heads, kv_heads, dim)
    arguments = structs.Attention(
        *(None,) * 4,
        *(tensor.data_ptr() for tensor in kept),
        *counts,
        *shape,
        call.window or _NO_WINDOW,
        scale,
        threads,
    )
    return arguments, kept


def _block_rows(rows: int, group: int, kv_heads: int, dim: int, threads: int) -> int:
    """How many rows a block gets: as many as it may hold, fewer where threads would be idle."""
    most = _BLOCK // dim // group
    fair = -(-rows * kv_heads // (_UNITS * threads))
    return max(4, min(most, fair) // 4 * 4)


class _Factors:
    """The factors of all adapters of a step for one product. `counts`: how many each adapter has there."""

    def __init__(self, found: Sequence[structs.Factor], counts: tuple[int, ...], kept: list[Tensor]) -> None:
        self.table = (structs.Factor * max(len(found), 1))(*found)
        self.counts = counts
        self._kept = kept  # the table points into these


def _factors(context: DeltaContext, parts: Sequence[Part]) -> _Factors | None:
    """None where an adapter's layer is not served."""
    found: list[structs.Factor] = []
    counts: list[int] = []
    kept: list[Tensor] = []
    for group in context.groups:
        before = len(found)
        for part in parts:
            weights = group.weights.get(part.path)
            if weights is None:
                continue
            a, b_t = weights.a.contiguous(), weights.b.t().contiguous()
            rank = a.shape[0]
            if rank > _MAX_RANK:
                return None
            kept += [a, b_t]
            found.append(structs.Factor(a.data_ptr(), b_t.data_ptr(), rank, part.out, part.offset, weights.scale))
        counts.append(len(found) - before)
    return _Factors(found, tuple(counts), kept)


def _owned(context: DeltaContext, counts: tuple[int, ...]) -> ctypes.Array[structs.Owned]:
    """Which rows get which factors, in the order of the table."""
    first = 0
    owned: list[structs.Owned] = []
    for group, count in zip(context.groups, counts, strict=True):
        owned.append(structs.Owned(group.start, group.end, first, count))
        first += count
    return (structs.Owned * len(owned))(*owned)


@functools.cache
def _native() -> NativeKernels | None:
    library = compiled()
    return None if library is None else NativeKernels(library)


def pick_kernels(dtype: torch.dtype, device: torch.device) -> Kernels:
    """The compiled kernels where they serve this type and device and can be had, else torch's own."""
    native = _native() if device.type == "cpu" and dtype in _TYPES else None
    return native or TorchKernels()
