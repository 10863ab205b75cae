"""Attention of an adapter's few tokens over a long given prefix, without gradients for the prefix.

torch's kernel would compute gradients for every key and value of the prefix, and repeat them for each group of heads;
the prefix is given and its heads are shared, so both can be left out. Registered under `NAME` for transformers' models.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "midstream_prefix"


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Output [batch, queries, heads, head_dim] of queries [batch, heads, queries, head_dim].

    The first of keys and values [batch, kv_heads, prefix + queries, head_dim] are the prefix. Without a prefix, or with
    anything but plain attention, transformers' own function answers.
    """
    length = query.shape[2]
    prefix = key.shape[2] - length
    if prefix == 0 or dropout or any(kwargs.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    batch, kv_heads, total, _ = key.shape
    groups = query.shape[1] // kv_heads
    # The heads of a group read the same keys: one product for all of them.
    folded = query.reshape(batch, kv_heads, groups * length, query.shape[3])
    own_keys, own_values = key[:, :, prefix:], value[:, :, prefix:]
    given_keys, given_values = key[:, :, :prefix].detach(), value[:, :, :prefix].detach()
    scores = torch.cat((folded @ given_keys.transpose(-1, -2), folded @ own_keys.transpose(-1, -2)), dim=-1)
    scores = scores * (scaling if scaling is not None else query.shape[3] ** -0.5)
    visible = _visible(attention_mask, length, total, query.device)
    scores = scores.view(batch, kv_heads, groups, length, total)
    if visible.dtype == torch.bool:
        scores = scores.masked_fill(~visible[:, :, None], float("-inf"))
    else:
        scores = scores + visible[:, :, None]
    shares = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype).view(batch, kv_heads, -1, total)
    out = shares[..., :prefix] @ given_values + shares[..., prefix:] @ own_values
    return out.view(batch, kv_heads * groups, length, -1).transpose(1, 2).contiguous(), None


def _visible(mask: Tensor | None, length: int, total: int, device: torch.device) -> Tensor:
    """The mask [batch or 1, heads or 1, queries, keys], bool or to be added; causal where there is none."""
    if mask is not None:
        return mask[..., :total]
    return torch.ones(1, 1, length, total, dtype=torch.bool, device=device).tril(total - length)


@contextmanager
def prefix_attention(network: Any) -> Iterator[None]:
    """Let a network that runs on torch's kernel use this attention for a while; any other keeps its own."""
    before = network.config._attn_implementation
    if before != "sdpa":
        yield
        return
    network.set_attn_implementation(NAME)
    try:
        yield
    finally:
        network.set_attn_implementation(before)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
