"""What the attention kernel gets of a call."""

from __future__ import annotations

import torch
from torch import Tensor

from midstream.models.extents import ExtentCall
from midstream.models.kv import LayerKV
from midstream.models.native import structs

# Numbers that the query vectors of a block may have: QueryBlock::MOST · dim in prefill.h.
_BLOCK = 12288
# Units of work for each thread, so that none waits long for the last ones.
_UNITS = 4
_NO_WINDOW = 1 << 60


def kv_addresses(kv: LayerKV) -> structs.KV:
    """Where a layer's keys and values lie, which must be contiguous."""
    return structs.KV(*(None if tensor is None else tensor.data_ptr() for tensor in kv))


def extent_arguments(call: ExtentCall, keys: Tensor, heads: int, rows: int, scale: float) -> structs.Attention:
    """The arguments that all layers of a step share; query, kv and out are to be filled in.

    keys [kv_heads, slots, dim]. The call keeps them, and the memory that they point to.
    """
    key = (heads, keys.shape, scale, torch.get_num_threads())
    if key not in call.prepared:
        call.prepared[key] = _prepare(call, keys, heads, rows, scale)
    arguments: structs.Attention = call.prepared[key][0]
    return arguments


def _prepare(
    call: ExtentCall, keys: Tensor, heads: int, rows: int, scale: float
) -> tuple[structs.Attention, list[Tensor]]:
    kv_heads, slots, dim = keys.shape
    threads = torch.get_num_threads()
    scratch = torch.empty(call.num_partials * heads * (dim + 2))
    blocks = call.cut(_block_rows(call.num_block_rows, heads // kv_heads, kv_heads, dim, threads))
    kept = [scratch, call.chunks, call.chunk_rows, call.merge_rows, call.merge_first, call.merge_partial]
    kept += [blocks, call.spans]
    arguments = structs.Attention(
        None,
        structs.KV(),
        None,
        *(tensor.data_ptr() for tensor in kept),
        *(len(call.chunks), len(call.merge_rows), len(blocks)),
        *(rows, slots, heads, kv_heads, dim),
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
