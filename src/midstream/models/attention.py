"""The attention function that transformers' models call: it writes new KV to the pool and attends over extents."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from midstream.models.attention_plan import AttentionPlan, CausalCall, DenseCall, MaskedCall, Rows

NAME = "midstream"

# Keyword arguments that change attention's result in a way that this function does not implement.
UNSUPPORTED = ("softcap", "s_aux", "position_bias", "indexer", "sinks")


class KVPool:
    """Keys and values of all layers: per layer [kv_heads, slots, head_dim], so that an extent is a strided view."""

    def __init__(self, shapes: list[tuple[int, int]], num_slots: int, dtype: torch.dtype, device: torch.device) -> None:
        self.num_slots = num_slots
        # Not zeroed: pages that no request has used yet take no memory.
        self.keys = [torch.empty(h, num_slots, d, dtype=dtype, device=device) for h, d in shapes]
        self.values = [torch.empty(h, num_slots, d, dtype=dtype, device=device) for h, d in shapes]

    def write(self, layer: int, slots: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put key and value [kv_heads, rows, head_dim] into `slots`; return the layer's whole keys and values."""
        keys, values = self.keys[layer], self.values[layer]
        keys.index_copy_(1, slots, key)
        values.index_copy_(1, slots, value)
        return keys, values

    @staticmethod
    def bytes_per_slot(shapes: list[tuple[int, int]], dtype: torch.dtype) -> int:
        """Bytes of one token's keys and values over all layers."""
        return sum(2 * heads * dim for heads, dim in shapes) * dtype.itemsize


class ProbePool(KVPool):
    """A pool for one sequence from slot 0 on, whose shapes the model itself shows at its first forward."""

    def __init__(self) -> None:
        super().__init__([], 0, torch.float32, torch.device("cpu"))
        self.shapes: dict[int, tuple[int, int]] = {}

    def write(self, layer: int, slots: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if key.shape != value.shape:
            shapes = f"keys {tuple(key.shape)} and values {tuple(value.shape)}"
            raise RuntimeError(f"{shapes} of one layer differ in shape")
        self.shapes[layer] = (key.shape[0], key.shape[2])
        return key, value


class ForwardPlan:
    """What one forward needs beside its tokens; passed through the model as a keyword argument."""

    def __init__(self, attention: AttentionPlan, pool: KVPool) -> None:
        self.attention = attention
        self.pool = pool


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
    plan = midstream_plan.attention
    keys, values = midstream_plan.pool.write(layer, plan.write_slots, key[0], value[0])
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    merged = _Merged(plan.num_rows)
    for call in plan.calls(sliding_window):
        q = _select(query, call.rows)
        if isinstance(call, DenseCall):
            k = keys[:, call.start : call.start + call.length]
            v = values[:, call.start : call.start + call.length]
            merged.add(call.rows, *_grouped(q, k, v, None, scale))
        elif isinstance(call, CausalCall):
            merged.add(call.rows, *_causal(q, keys, values, call, scale))
        elif isinstance(call, MaskedCall):
            k, v = keys.index_select(1, call.slots), values.index_select(1, call.slots)
            merged.add(call.rows, *_grouped(q, k, v, call.mask, scale))
    return merged.result(query).transpose(1, 2), None


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
        return self._out.unsqueeze(0).to(query.dtype)


def _select(query: Tensor, rows: Rows) -> Tensor:
    """[1, heads, all rows, dim] → [heads, rows, dim]."""
    return query[0][:, rows.selector]


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


def _causal(q: Tensor, keys: Tensor, values: Tensor, call: CausalCall, scale: float) -> tuple[Tensor, Tensor]:
    """Causal attention of a segment over its own KV."""
    group = q.shape[0] // keys.shape[0]
    k = keys[:, call.start : call.start + call.length].repeat_interleave(group, 0).unsqueeze(0)
    v = values[:, call.start : call.start + call.length].repeat_interleave(group, 0).unsqueeze(0)
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
