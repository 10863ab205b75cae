"""Attention over extents of the KV pool, and the function by which transformers' models call it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from midstream.models.attention_plan import AttentionPlan, CausalCall, DenseCall, MaskedCall, Rows
from midstream.models.kernels import Kernels
from midstream.models.kv import LayerKV
from midstream.models.pool import AttentionShape, ForwardPlan, ProbePool

NAME = "midstream"

# Keyword arguments that change attention's result in a way that this function does not implement.
UNSUPPORTED = ("softcap", "s_aux", "position_bias", "indexer", "sinks")


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    midstream_plan: ForwardPlan | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend as the plan says.

    query [1, heads, rows, dim], key and value [1, kv_heads, rows, dim] → [1, rows, heads, dim].

    Raises RuntimeError when a model calls it without a plan, or with an argument that it does not implement.
    """
    if midstream_plan is None:
        raise RuntimeError("the model does not pass the engine's plan through to its attention")
    for name in UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise RuntimeError(f"attention with {name} is not implemented")
    layer: int = module.layer_idx  # type: ignore[assignment]
    plan, pool = midstream_plan.attention, midstream_plan.pool
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if isinstance(pool, ProbePool):
        pool.note(layer, AttentionShape(query.shape[1], key.shape[1], query.shape[3], scale, sliding_window))
    kv = pool.write(layer, plan.write_slots, key[0], value[0])
    out = attend(query[0], kv, plan, midstream_plan.kernels, scale, sliding_window)
    return out.unsqueeze(0), None


def attend(
    query: Tensor,
    kv: LayerKV,
    plan: AttentionPlan,
    kernels: Kernels,
    scale: float,
    window: int | None,
) -> Tensor:
    """Attend as the plan says: query [heads, rows, dim] over the layer's KV → [rows, heads, dim]."""
    if plan.extents:
        return kernels.attend(query, kv, plan.extent_call(window), scale)
    whole = kernels.attend_step(query, kv, plan, scale, window)
    if whole is not None:
        return whole
    merged = _Merged(plan.num_rows)
    for call in plan.calls(window):
        q = query[:, call.rows.selector]
        if isinstance(call, DenseCall):
            merged.add(call.rows, *_grouped(q, *kv.read(_extent(call), q.dtype), None, scale))
        elif isinstance(call, CausalCall):
            merged.add(call.rows, *_causal(q, *kv.read(_extent(call), q.dtype), scale))
        elif isinstance(call, MaskedCall):
            merged.add(call.rows, *_grouped(q, *kv.read(call.slots, q.dtype), call.mask, scale))
    return merged.result(query).transpose(0, 1)


def _extent(call: DenseCall | CausalCall) -> slice:
    return slice(call.start, call.start + call.length)


class _Merged:
    """Partial attention results of a step's rows, merged by log-sum-exp."""

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows
        self._out: Tensor | None = None
        self._lse: Tensor | None = None

    def add(self, rows: Rows, out: Tensor, lse: Tensor) -> None:
        """Merge `out` [heads, rows, dim] with `lse` [heads, rows] (float32) into what these rows have."""
        if self._out is None or self._lse is None:
            if rows.total == self._num_rows and isinstance(rows.selector, slice):
                self._out, self._lse = out, lse
                return
            self._out = out.new_zeros(out.shape[0], self._num_rows, out.shape[2])
            self._lse = lse.new_full((lse.shape[0], self._num_rows), float("-inf"))
        whole = rows.total == self._num_rows and isinstance(rows.selector, slice)
        old_out = self._out if whole else self._out[:, rows.selector]
        old_lse = self._lse if whole else self._lse[:, rows.selector]
        # old/(old+new) as a sigmoid of the difference; -inf for rows that have nothing yet gives weight 0.
        weight = torch.sigmoid(old_lse - lse).unsqueeze(-1).to(out.dtype)
        mixed = torch.lerp(out, old_out.to(out.dtype), weight)
        total = torch.logaddexp(old_lse, lse)
        if whole:
            self._out, self._lse = mixed, total
        else:
            self._out[:, rows.selector] = mixed
            self._lse[:, rows.selector] = total

    def result(self, query: Tensor) -> Tensor:
        assert self._out is not None
        return self._out.to(query.dtype)


def _grouped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Attention without causality, the query heads of one KV head folded into its rows.

    q [heads, rows, dim], k and v [kv_heads, length, dim], mask [rows, length] → out like q, lse [heads, rows].
    """
    heads, rows, dim = q.shape
    kv_heads = k.shape[0]
    group = heads // kv_heads
    folded = q.reshape(1, kv_heads, group * rows, dim)
    if mask is not None and group > 1:
        mask = mask.repeat(group, 1)
    out, lse = _attend(folded, k.unsqueeze(0), v.unsqueeze(0), mask, False, scale)
    return out.reshape(heads, rows, v.shape[-1]), lse.reshape(heads, rows)


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Causal attention of a segment over its own KV [kv_heads, rows, dim]."""
    group = q.shape[0] // k.shape[0]
    k, v = (tensor.repeat_interleave(group, 0).unsqueeze(0) for tensor in (k, v))
    out, lse = _attend(q.unsqueeze(0), k, v, None, True, scale)
    return out[0], lse[0]


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(q kᵀ · scale) v and its log-sum-exp, all [1, heads, …]."""
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, is_causal=causal, attn_mask=mask, scale=scale
        )
        return out, lse.float()
    return attend_by_definition(q, k, v, mask, causal, scale)


def attend_by_definition(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """The same by plain matrix products in float32: for devices without a kernel that returns the log-sum-exp."""
    scores = torch.matmul(q.float(), k.float().transpose(-1, -2)) * scale
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    if mask is not None:
        scores = scores + mask.float()
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.unsqueeze(-1))
    return torch.matmul(weights, v.float()).to(q.dtype), lse


AttentionInterface.register(NAME, attention)
