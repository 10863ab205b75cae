"""The device's kernels behind the interface that the model's layers use."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from midstream.models.attention_plan import AttentionPlan, RowSegment
from midstream.models.cuda.factors import ProductFactors, RowOwners, product_factors, row_owners
from midstream.models.cuda.tables import DeviceTables, Tiling, build_tables
from midstream.models.deltas import DeltaContext, Part
from midstream.models.device import on_device
from midstream.models.kernels import Kernels, TorchKernels
from midstream.models.kv import LayerKV

log = logging.getLogger(__name__)

OWNERS = "owners"  # in DeltaContext.owned
# More adapter rows than this and torch's blocked products win over one program for each row.
_DELTA_ROWS = 64
MAX_RANK = 256
_MAX_DIM = 256
_MAX_NORM = 16384
# Query vectors of a tile. Matrix units take 16 at least; in float32 a tile of 64 does not fit the registers.
_BLOCKS = {torch.float32: (16, 32), torch.bfloat16: (16, 64, 128), torch.float16: (16, 64, 128)}
# Programs that a multiprocessor has at once or soon after: enough that loads of one hide behind another's.
_PROGRAMS_EACH = 4


class Programs(Protocol):
    """What runs on the device; the tests give another."""

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, tables: DeviceTables, scale: float) -> Tensor: ...

    def norm(self, x: Tensor, update: Tensor | None, alpha: float, weight: Tensor, eps: float) -> Tensor: ...

    def rotate(
        self, qkv: Tensor, cosine: Tensor, sine: Tensor, keys: Tensor, values: Tensor, slots: Tensor
    ) -> Tensor: ...

    def gated(self, both: Tensor) -> Tensor: ...

    def add_deltas(self, x: Tensor, y: Tensor, owners: Tensor, factors: ProductFactors) -> None: ...


class CudaKernels(TorchKernels):
    """Attention of whole steps by tables, and everything else in one program a call; the rest is torch's own."""

    def __init__(self, programs: Programs, multiprocessors: int) -> None:
        self._programs = programs
        self._multiprocessors = multiprocessors

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if x.shape[1] > _MAX_NORM:
            return super().norm(x, weight, eps)
        return self._programs.norm(x, None, 0.0, weight, eps)

    def add_norm(self, x: Tensor, update: Tensor, alpha: float, weight: Tensor, eps: float) -> Tensor:
        if x.shape[1] > _MAX_NORM:
            return super().add_norm(x, update, alpha, weight, eps)
        return self._programs.norm(x, update, alpha, weight, eps)

    def rotate(self, qkv: Tensor, cosine: Tensor, sine: Tensor, kv: LayerKV, slots: Tensor) -> Tensor:
        return self._programs.rotate(qkv, cosine, sine, kv.keys, kv.values, slots)

    def gated(self, both: Tensor) -> Tensor:
        return self._programs.gated(both)

    def attend_step(
        self, query: Tensor, kv: LayerKV, plan: AttentionPlan, scale: float, window: int | None
    ) -> Tensor | None:
        heads, _, dim = query.shape
        tiling = self.tiling(heads, kv.keys.shape[0], dim, query.dtype)
        if tiling is None:
            return None
        key = tables_key(heads, kv.keys.shape[0], window)
        tables = plan.prepared.get(key)
        if tables is None:
            found = build_tables(plan.segments, plan.num_rows, tiling, window)
            tables = plan.prepared[key] = DeviceTables.of(found, query.device)
        if query.stride(2) != 1:
            query = query.contiguous()
        return self._programs.attend(query, kv.keys, kv.values, tables, scale)

    def tiling(self, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> Tiling | None:
        """How tiles are cut for such heads; None where they are too many for a KV head, or too large."""
        group = heads // kv_heads
        blocks = tuple(block for block in _BLOCKS.get(dtype, ()) if block >= group)
        if not blocks or dim > _MAX_DIM:
            return None
        return Tiling(group, kv_heads, blocks, _PROGRAMS_EACH * self._multiprocessors)

    def add_deltas(self, x: Tensor, y: Tensor, context: DeltaContext, parts: Sequence[Part]) -> bool:
        owners: RowOwners | None = context.owned.get(OWNERS)
        if owners is None:
            owners = context.owned[OWNERS] = row_owners(context.groups, x.device)
        if owners.end - owners.start > _DELTA_ROWS:
            return False
        key = parts[0].path
        factors: ProductFactors | None = context.tables.get(key)
        if factors is None:
            factors = context.tables[key] = product_factors(context.groups, parts, x.device)
        if factors.rank_block > MAX_RANK:
            return False
        if factors.rank_block:
            rows = slice(owners.start, owners.end)
            self._programs.add_deltas(x[rows].contiguous(), y[rows], owners.numbers, factors)
        return True


def tables_key(heads: int, kv_heads: int, window: int | None) -> tuple[str, int, int, int | None]:
    """Where a plan keeps the tables for such layers."""
    return "tables", heads, kv_heads, window


@functools.cache
def cuda_kernels(dtype: torch.dtype, device: torch.device) -> Kernels:
    """The Triton programs where they can be compiled and run, else torch's own, slower, with a warning."""
    try:
        # Heavy, and on CPUs not there: it comes with torch's CUDA wheels.
        from midstream.models.cuda.programs.launch import TritonPrograms

        kernels = CudaKernels(TritonPrograms(), torch.cuda.get_device_properties(device).multi_processor_count)
        with on_device(device):
            _try(kernels, dtype, device)
    except Exception as error:
        # Triton raises many types: no compiler for its launcher, no toolkit for this card, too little shared memory.
        log.warning(
            "attention on %s is computed by its definition, slowly: Triton does not run here: %s", device, error
        )
        return TorchKernels()
    return kernels


@torch.inference_mode()
def _try(kernels: CudaKernels, dtype: torch.dtype, device: torch.device) -> None:
    """One small attention. Raises what Triton raises where it does not run, ValueError on a wrong result."""
    numbers = torch.linspace(-1, 1, 4 * 3 * 32, device=device).view(4, 3, 32).to(dtype)
    plan = AttentionPlan((RowSegment(row=0, count=3, position=0, slot=0, seen=()),), numbers.dtype, device, 3)
    found = kernels.attend_step(numbers, LayerKV(numbers[:2].contiguous(), numbers[2:].contiguous()), plan, 0.2, None)
    # The first row sees itself alone, so it gets its own value.
    first = numbers[2:, 0].repeat_interleave(2, 0)
    if found is None or not torch.allclose(found[0], first, atol=1e-2):
        raise ValueError("attention of three rows is not what it should be")
