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
    if base_kv is None:
        return _whole(network, examples, tails)
    # The last token of a tail predicts nothing that is asked for.
    texts = [(*e.invocation, *tail[:-1]) for e, tail in zip(examples, tails, strict=True)]
    longest = max(map(len, texts))
    ids, mask = _padded(texts, longest, left=False)
    cache, prefix_mask = base_kv.batch([e.prefix for e in examples])
    first = torch.tensor([[len(e.prefix)] for e in examples])
    logits = network(
        input_ids=ids.to(network.device),
        attention_mask=torch.cat((prefix_mask, mask.to(network.device)), dim=1),
        position_ids=(first + torch.arange(longest)).to(network.device),
        cache=cache,
        use_cache=False,
        # As an index, so that the output layer gets one matrix of rows and not a slow batch of small ones.
        logits_to_keep=torch.arange(first_kept := min(len(e.invocation) for e in examples) - 1, longest),
    ).logits
    starts = [len(e.invocation) - 1 - first_kept for e in examples]
    rows = [logits[i, start : start + len(tail)] for i, (start, tail) in enumerate(zip(starts, tails, strict=True))]
    return torch.cat(rows)


def _whole(network: Any, examples: Sequence[Example], tails: Sequence[Sequence[int]]) -> Tensor:
    texts = [(*e.prefix, *e.invocation, *tail[:-1]) for e, tail in zip(examples, tails, strict=True)]
    ids, mask = _padded(texts, max(map(len, texts)), left=True)
    logits = network(
        input_ids=ids.to(network.device),
        attention_mask=mask.to(network.device),
        position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0).to(network.device),
        use_cache=False,
        logits_to_keep=torch.arange(ids.shape[1] - max(map(len, tails)), ids.shape[1]),
    ).logits
    return torch.cat([logits[i, -len(tail) :] for i, tail in enumerate(tails)])


def _padded(texts: Sequence[Sequence[int]], longest: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """Token ids and mask, both [texts, longest]."""
    ids = torch.zeros(len(texts), longest, dtype=torch.long)
    mask = torch.zeros(len(texts), longest, dtype=torch.long)
    for i, text in enumerate(texts):
        place = slice(longest - len(text), longest) if left else slice(0, len(text))
        ids[i, place] = torch.tensor(list(text))
        mask[i, place] = 1
    return ids, mask


def batch_loss(network: Any, examples: Sequence[Example], base_kv: BaseKV | None) -> Tensor:
    """Mean cross-entropy (nats per token) of the examples' targets, each example weighing the same."""
    logits = target_logits(network, examples, base_kv, [e.target for e in examples])
    targets = torch.tensor([token for e in examples for token in e.target], device=logits.device)
    weights = torch.tensor([1 / len(e.target) for e in examples for _ in e.target], device=logits.device)
    losses = F.cross_entropy(logits.float(), targets, reduction="none")
    return (losses * weights).sum() / len(examples)
