"""Choosing a token from one row of logits."""

from __future__ import annotations

import torch
from torch import Tensor

from midstream.types import SamplingParams, TokenLogprob


def make_generator(params: SamplingParams, index: int) -> torch.Generator | None:
    """A generator of its own for each branch of a sampled request; None for greedy decoding.

    Without a seed it is seeded from the operating system.
    """
    if params.temperature == 0.0:
        return None
    generator = torch.Generator()
    if params.seed is None:
        generator.seed()
    else:
        generator.manual_seed((params.seed + index) % 2**63)
    return generator


def choose(logits: Tensor, params: SamplingParams, generator: torch.Generator | None) -> int:
    """A token id from logits [vocab] (float32): greedy, or temperature then top-k, top-p and min-p."""
    if generator is None:
        return int(torch.argmax(logits))
    # In float64, and the largest at 0: any temperature above 0 then gives a distribution.
    scaled = (logits.double() - logits.max()) / params.temperature
    values, order = torch.sort(scaled, descending=True)
    probabilities = torch.softmax(values, dim=0)
    keep = torch.ones_like(probabilities, dtype=torch.bool)
    if params.top_k:
        keep[params.top_k :] = False
    if params.top_p < 1.0:
        # A token stays while the mass before it is below top_p, so that the first always stays.
        keep &= torch.cumsum(probabilities, dim=0) - probabilities < params.top_p
    if params.min_p > 0.0:
        keep &= probabilities >= params.min_p * probabilities[0]
    kept = torch.where(keep, probabilities, 0.0)
    pick = torch.multinomial(kept.cpu(), 1, generator=generator)
    return int(order[pick.to(order.device)])


def logprob_of(logits: Tensor, token: int, top: int) -> TokenLogprob:
    """Log-probability of `token` and of the `top` likeliest tokens, from the model's own logits [vocab]."""
    logprobs = torch.log_softmax(logits, dim=0)
    best = torch.topk(logprobs, top) if top else None
    pairs = [] if best is None else zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return TokenLogprob(token, float(logprobs[token]), top=tuple(TokenLogprob(t, value) for t, value in pairs))
