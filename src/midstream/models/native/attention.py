"""What the attention kernel gets of a call."""

from __future__ import annotations

import torch
from torch import Tensor

from midstream.models.extents import ExtentCall
from midstream.models.native import structs


def extent_arguments(call: ExtentCall, keys: Tensor, heads: int, batch_rows: int, scale: float) -> structs.Attention:
    """The arguments that all layers of a step share; query, keys, values, out and lse are to be filled in.

    keys [kv_heads, slots, dim]. The call keeps them, and the memory that they point to.
    """
    key = (heads, keys.shape, scale)
    if key not in call.prepared:
        call.prepared[key] = _prepare(call, keys, heads, batch_rows, scale)
    arguments: structs.Attention = call.prepared[key][0]
    return arguments


def _prepare(
    call: ExtentCall, keys: Tensor, heads: int, batch_rows: int, scale: float
) -> tuple[structs.Attention, Tensor]:
    kv_heads, slots, dim = keys.shape
    scratch = torch.empty(call.num_partials * heads * (dim + 2))
    plan = (call.chunks, call.chunk_rows, call.merge_first, call.merge_partial)
    arguments = structs.Attention(
        *(None,) * 5,
        scratch.data_ptr(),
        *(tensor.data_ptr() for tensor in plan),
        len(call.chunks),
        call.rows.total,
        batch_rows,
        slots,
        heads,
        kv_heads,
        dim,
        scale,
        torch.get_num_threads(),
    )
    return arguments, scratch
