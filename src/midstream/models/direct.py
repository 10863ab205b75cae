"""One call of a model: tokens and a plan to logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from midstream.models.attention_plan import AttentionPlan, RowSegment
from midstream.models.fusions import FusedRMSNorm
from midstream.models.kernels import Kernels
from midstream.models.pool import ForwardPlan, KVPool
from midstream.models.rotary import Rotary, tabled
from midstream.models.stack import FusedStack

# Models that do nothing around their layers but what DirectCall does.
_KNOWN = frozenset({"LlamaForCausalLM", "MistralForCausalLM", "GraniteForCausalLM", "Qwen2ForCausalLM"})
_PROBE_TOKENS = 12
# Largest difference between two ways through one prepared model, relative to the largest logit.
_SAME = {torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 0.01}


class ModelCall(Protocol):
    def __call__(self, tokens: Tensor, positions: Tensor, wanted: Tensor, plan: ForwardPlan) -> Tensor:
        """tokens, positions [rows]; `wanted`: the rows whose logits are returned, [wanted, vocab] in float32."""
        ...


@dataclass(frozen=True, slots=True)
class OwnCall:
    """The transformers model's own."""

    model: nn.Module

    def __call__(self, tokens: Tensor, positions: Tensor, wanted: Tensor, plan: ForwardPlan) -> Tensor:
        output = self.model(
            input_ids=tokens[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=wanted,
            midstream_plan=plan,
        )
        logits: Tensor = output.logits[0].float()
        return logits


@dataclass(frozen=True, slots=True)
class DirectCall:
    """The same for a model whose layers are one stack, without the checks that a step of few rows would wait for."""

    embedding: nn.Embedding
    rotary: Rotary
    stack: FusedStack
    norm: FusedRMSNorm
    head: nn.Module
    kernels: Kernels
    embedding_scale: float
    logits_scale: float

    def __call__(self, tokens: Tensor, positions: Tensor, wanted: Tensor, plan: ForwardPlan) -> Tensor:
        x = F.embedding(tokens, self.embedding.weight)
        if self.embedding_scale != 1.0:
            x = x * self.embedding_scale
        turning = self.rotary(x, positions[None])
        x = self.stack(x[None], position_embeddings=turning, midstream_plan=plan)[0]
        normed = self.kernels.norm(x.index_select(0, wanted), self.norm.weight, self.norm.eps)
        logits: Tensor = self.head(normed)
        return logits if self.logits_scale == 1.0 else logits / self.logits_scale


def direct_call(network: Any, kernels: Kernels) -> DirectCall | None:
    """None for a model that may do more around its layers, or whose layers are not one stack."""
    if type(network).__name__ not in _KNOWN:
        return None
    inner, config = network.model, network.config
    if not isinstance(inner.layers[0], FusedStack) or not isinstance(inner.norm, FusedRMSNorm):
        return None
    if inner.norm.weight.dtype != network.dtype:
        return None
    return DirectCall(
        embedding=inner.embed_tokens,
        rotary=tabled(inner.rotary_emb, network.device),
        stack=inner.layers[0],
        norm=inner.norm,
        head=network.lm_head,
        kernels=kernels,
        embedding_scale=float(getattr(config, "embedding_multiplier", 1.0)),
        logits_scale=float(getattr(config, "logits_scaling", 1.0)),
    )


def pick_call(network: Any, kernels: Kernels, extents: bool, shapes: Sequence[tuple[int, int]]) -> ModelCall:
    """The direct one where there is one and it gives what the model itself gives.

    `extents`: whether the kernels serve all attention; `shapes`: KV heads and the size of each, by layer.
    """
    own = OwnCall(network)
    direct = direct_call(network, kernels)
    if direct is None:
        return own
    tokens = probe_tokens(network)
    pool = KVPool(shapes, len(tokens), network.dtype, network.device)
    segment = RowSegment(row=0, count=len(tokens), position=0, slot=0, seen=())
    plan = AttentionPlan((segment,), network.dtype, network.device, len(tokens), extents)
    return direct if agree(direct, own, tokens, ForwardPlan(plan, pool, kernels), _SAME[network.dtype]) else own


def probe_tokens(network: Any) -> Tensor:
    """The text [tokens] by which a model is tried."""
    return torch.arange(_PROBE_TOKENS, device=network.device) * 7 % network.config.get_text_config().vocab_size


@torch.inference_mode()
def agree(one: ModelCall, other: ModelCall, tokens: Tensor, plan: ForwardPlan, tolerance: float) -> bool:
    """Whether two calls give the same logits but for a part of the largest."""
    positions = torch.arange(len(tokens), device=tokens.device)
    found, expected = (call(tokens, positions, positions, plan) for call in (one, other))
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())
