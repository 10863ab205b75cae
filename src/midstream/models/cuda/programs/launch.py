"""Launching the Triton programs: their grids, their block sizes, and where their results go.

One attention kernel of our own serves prefill and decode. torch's flash attention would do for a long dense range or a
causal segment, but not for many rows that see many ranges of the pool, and each of its calls writes a result to be
merged; and in float32, in which the engine is compared with PEFT, it has none.
"""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

from midstream.models.cuda.factors import ProductFactors
from midstream.models.cuda.programs import attention, deltas, pointwise
from midstream.models.cuda.tables import DeviceTables

_LOG2_E = 1.4426950408889634
# Bytes of shared memory above which three blocks of keys and values are kept in flight.
_LARGE_SHARED = 160 * 1024
_MERGED_AT_ONCE = 16
_GATE_BLOCK = 1024
_BLOCK_RANK = 16
_BLOCK_IN = 512
_BLOCK_OUT = 128


class TritonPrograms:
    """What `CudaKernels` runs on the device."""

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, tables: DeviceTables, scale: float) -> Tensor:
        """query [heads, rows, dim], keys and values [kv_heads, slots, dim] → [rows, heads, dim]."""
        heads, rows, dim = query.shape
        out = query.new_empty(rows, heads, dim)
        if tables.direct:
            partial = lse = out
        else:
            partial = torch.empty(len(tables.entries), heads, dim, dtype=torch.float32, device=query.device)
            lse = torch.empty(len(tables.entries), heads, dtype=torch.float32, device=query.device)
        for block, tiles in tables.tiles:
            self._attend_tiles(query, keys, values, tables, scale, block, tiles, partial, lse)
        if not tables.direct:
            attention.merge_row[(rows, heads)](
                partial,
                lse,
                out,
                tables.merge_first,
                tables.merge_entries,
                HEADS=heads,
                DIM=dim,
                BLOCK_D=_power(dim),
                BLOCK_E=_MERGED_AT_ONCE,
                num_warps=4,
            )
        return out

    def _attend_tiles(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        tables: DeviceTables,
        scale: float,
        block: int,
        tiles: Tensor,
        partial: Tensor,
        lse: Tensor,
    ) -> None:
        heads, _, dim = query.shape
        kv_heads = keys.shape[0]
        attention.attend_tile[(len(tiles), kv_heads)](
            query,
            keys,
            values,
            partial,
            lse,
            tiles,
            tables.entries,
            query.stride(0),
            query.stride(1),
            keys.stride(0),
            scale * _LOG2_E,
            HEADS=heads,
            GROUP=heads // kv_heads,
            DIM=dim,
            DIRECT=tables.direct,
            **attention_settings(block, dim, query.dtype, _shared_memory(query.device)),
        )

    def norm(self, x: Tensor, update: Tensor | None, alpha: float, weight: Tensor, eps: float) -> Tensor:
        rows, dim = x.shape
        out = x.new_empty(rows, dim)
        block = _power(dim)
        pointwise.norm_row[(rows,)](
            x,
            x if update is None else update,
            weight,
            out,
            alpha,
            eps,
            x.stride(0),
            DIM=dim,
            BLOCK=block,
            ADD=update is not None,
            num_warps=min(16, max(1, block // 512)),
        )
        return out

    def rotate(self, qkv: Tensor, cosine: Tensor, sine: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> Tensor:
        kv_heads, _, dim = keys.shape
        rows = qkv.shape[0]
        heads = qkv.shape[1] // dim - 2 * kv_heads
        query = qkv.new_empty(heads, rows, dim)
        pointwise.rotate_head[(rows, heads + 2 * kv_heads)](
            qkv,
            cosine,
            sine,
            query,
            keys,
            values,
            slots,
            rows,
            cosine.stride(0),
            sine.stride(0),
            keys.stride(0),
            HEADS=heads,
            KV_HEADS=kv_heads,
            HALF=dim // 2,
            BLOCK=_power(dim // 2),
            num_warps=1,
        )
        return query

    def gated(self, both: Tensor) -> Tensor:
        rows, width = both.shape[0], both.shape[1] // 2
        out = both.new_empty(rows, width)
        pointwise.gate_block[(rows, triton.cdiv(width, _GATE_BLOCK))](
            both, out, WIDTH=width, BLOCK=_GATE_BLOCK, num_warps=4
        )
        return out

    def add_deltas(self, x: Tensor, y: Tensor, owners: Tensor, factors: ProductFactors) -> None:
        """Add the deltas of x [rows, in] to y [rows, out], for rows with these `owners` [rows]."""
        rows, in_features = x.shape
        adapters, parts, rank = factors.table.shape[1], len(factors.parts), factors.rank_block
        low = torch.empty(rows, parts, rank, dtype=torch.float32, device=x.device)
        deltas.shrink_row[(rows, parts, triton.cdiv(rank, _BLOCK_RANK))](
            x,
            factors.table,
            owners,
            factors.parts,
            low,
            in_features,
            rank,
            ADAPTERS=adapters,
            BLOCK_R=_BLOCK_RANK,
            BLOCK_IN=_BLOCK_IN,
            num_warps=4,
        )
        deltas.expand_block[(rows, parts, triton.cdiv(factors.widest, _BLOCK_OUT))](
            y,
            factors.table,
            owners,
            factors.parts,
            low,
            y.shape[1],
            rank,
            ADAPTERS=adapters,
            BLOCK_R=_BLOCK_RANK,
            BLOCK_OUT=_BLOCK_OUT,
            num_warps=4,
        )


def attention_settings(block: int, dim: int, dtype: torch.dtype, shared_memory: int) -> dict[str, int | str]:
    """Block sizes of an attention kernel, its warps, and how many blocks of keys are on their way at once."""
    full = dtype == torch.float32
    block_d = max(16, _power(dim))
    stages = 3 if shared_memory >= _LARGE_SHARED and block_d <= 128 else 2
    return {
        "BLOCK_D": block_d,
        "BLOCK_M": block,
        "BLOCK_N": 32 if full or block_d > 128 else 64,
        "PRECISION": "ieee" if full else "tf32",
        "num_warps": 8 if block > 64 else 4,
        "num_stages": 1 if full else stages,
    }


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may take; of the interpreter, which has no such limit, none."""
    if device.type != "cuda":
        return 0
    index = torch.cuda.current_device() if device.index is None else device.index
    return int(triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"])


def _power(number: int) -> int:
    """The least power of two that is not below it."""
    return int(triton.next_power_of_2(number))
