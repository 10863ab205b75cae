"""The given KV of a batch of prefixes, in the form that transformers' models read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin
from transformers.modeling_layers import GradientCheckpointingLayer


class _PrefixLayer(CacheLayerMixin):
    """One layer's keys and values [batch, kv_heads, tokens, head_dim], read and never written.

    So a layer that gradient checkpointing runs twice sees the same both times.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the prefix is there from the start."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return torch.cat((self.keys, key_states), dim=-2), torch.cat((self.values, value_states), dim=-2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return int(self.keys.shape[-2])

    def get_max_length(self) -> int:
        return -1


def prefix_cache(keys_and_values: Tensor) -> Cache:
    """A cache over [layers, 2, batch, kv_heads, tokens, head_dim] that the forward pass reads but never extends."""
    return Cache(layers=[_PrefixLayer(layer[0], layer[1]) for layer in keys_and_values])


def use_gradient_checkpointing(network: Any) -> None:
    """Recompute each layer in the backward pass instead of keeping its activations.

    transformers takes the cache away from a checkpointed layer, and with it the prefix, unless the layer only reads it.
    Ours are only read.
    """
    network.activation_checkpointing_enable({"use_reentrant": False})
    for module in network.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module._can_checkpoint_with_cache = True
