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
        return _largest(logits)
    # In float64, and the largest at 0: any temperature above 0 then gives a distribution.
    scaled = (logits.double() - logits.max()) / params.temperature
    probabilities = _kept(torch.softmax(scaled, dim=0), params)
    # Drawn in the order of the vocabulary: in that of likelihood, two tokens that are all but equally likely change
    # places with the last bit of their logits, and with them what the same seed draws.
    return int(torch.multinomial(probabilities.cpu(), 1, generator=generator))


def _largest(logits: Tensor) -> int:
    # NumPy finds it several times faster than torch, and the first of equal ones.
    return int(logits.numpy().argmax()) if logits.device.type == "cpu" else int(torch.argmax(logits))


def _kept(probabilities: Tensor, params: SamplingParams) -> Tensor:
    """Zero where top-k, top-p or min-p leaves a token out."""
    if params.min_p > 0.0:
        probabilities = torch.where(probabilities >= params.min_p * probabilities.max(), probabilities, 0.0)
    if not params.top_k and params.top_p >= 1.0:
        return probabilities
    values, order = torch.sort(probabilities, descending=True)
    keep = torch.ones_like(values, dtype=torch.bool)
    if params.top_k:
        keep[params.top_k :] = False
    if params.top_p < 1.0:
        # A token stays while the mass before it is below top_p, so that the first always stays.
        keep &= torch.cumsum(values, dim=0) - values < params.top_p
    return torch.zeros_like(probabilities).index_copy_(0, order, torch.where(keep, values, 0.0))


def logprob_of(logits: Tensor, token: int, top: int) -> TokenLogprob:
    """Log-probability of `token` and of the `top` likeliest tokens, from the model's own logits [vocab]."""
    logprobs = torch.log_softmax(logits, dim=0)
    best = torch.topk(logprobs, top) if top else None
    pairs = [] if best is None else zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return TokenLogprob(token, float(logprobs[token]), top=tuple(TokenLogprob(t, value) for t, value in pairs))
