"""One batch through the model: as an aLoRA on top of the base model's KV, or as a plain LoRA over everything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from midstream.training.base_kv import BaseKV
from midstream.training.data import Example


def target_logits(
    network: Any, examples: Sequence[Example], base_kv: BaseKV | None, tails: Sequence[Sequence[int]]
) -> Tensor:
    """Logits [sum of tail lengths, vocab] that predict each token of each tail, one tail after the other.

    A tail is what follows an example's invocation. With `base_kv`, `network` adapts the tokens from the invocation
    on and the prefix comes from there, without gradients; without it, `network` adapts and reads everything.
    """
    texts = [
        (*(() if base_kv is not None else e.prefix), *e.invocation, *tail)
        for e, tail in zip(examples, tails, strict=True)
    ]
    longest = max(len(text) for text in texts)
    ids = torch.zeros(len(texts), longest, dtype=torch.long)
    mask = torch.zeros(len(texts), longest, dtype=torch.long)
    positions = torch.zeros(len(texts), longest, dtype=torch.long)
    for i, (example, text) in enumerate(zip(examples, texts, strict=True)):
        ids[i, : len(text)] = torch.tensor(text)
        mask[i, : len(text)] = 1
        first = len(example.prefix) if base_kv is not None else 0
        positions[i] = torch.arange(first, first + longest)
    cache = None
    if base_kv is not None:
        cache, prefix_mask = base_kv.batch([e.prefix for e in examples])
        mask = torch.cat((prefix_mask.cpu(), mask), dim=1)
    device = network.device
    hidden = network.model(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        position_ids=positions.to(device),
        cache=cache,
        use_cache=cache is not None,
    ).last_hidden_state
    rows = [
        hidden[i, len(text) - len(tail) - 1 : len(text) - 1]
        for i, (text, tail) in enumerate(zip(texts, tails, strict=True))
    ]
    logits: Tensor = network.lm_head(torch.cat(rows))
    return logits


def batch_loss(network: Any, examples: Sequence[Example], base_kv: BaseKV | None) -> Tensor:
    """Mean cross-entropy (nats per token) of the examples' targets, each example weighing the same."""
    logits = target_logits(network, examples, base_kv, [e.target for e in examples])
    targets = torch.tensor([token for e in examples for token in e.target], device=logits.device)
    weights = torch.tensor([1 / len(e.target) for e in examples for _ in e.target], device=logits.device)
    losses = F.cross_entropy(logits.float(), targets, reduction="none")
    return (losses * weights).sum() / len(examples)
