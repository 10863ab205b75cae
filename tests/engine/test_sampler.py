"""Which tokens a sampler keeps, and that the last bit of a logit does not change what a seed draws."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from midstream.engine.sampler import _kept, choose, make_generator
from midstream.types import SamplingParams

VOCAB = 50


@st.composite
def filters(draw: st.DrawFn) -> dict[str, float]:
    """Any of the three, alone and together."""
    params: dict[str, float] = {}
    if draw(st.booleans()):
        params["top_k"] = draw(st.integers(1, VOCAB + 5))
    if draw(st.booleans()):
        params["top_p"] = draw(st.floats(0.05, 1.0))
    if draw(st.booleans()):
        params["min_p"] = draw(st.floats(0.0, 1.0))
    return params


def random_logits(seed: int) -> Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def stays(token: int, probabilities: list[float], params: SamplingParams) -> bool:
    """By the definitions: few enough are likelier, their mass is small enough, it is likely enough itself."""
    likelier = [p for p in probabilities if p > probabilities[token]]
    return (
        (not params.top_k or len(likelier) < params.top_k)
        and (params.top_p >= 1.0 or sum(likelier) < params.top_p)
        and probabilities[token] >= params.min_p * max(probabilities)
    )


@given(st.integers(0, 2**32), filters())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_exactly_the_tokens_of_the_definitions_are_kept(seed: int, filters: dict[str, float]) -> None:
    params = SamplingParams(temperature=1.0, **filters)
    probabilities = torch.softmax(random_logits(seed).double(), dim=0)
    kept = _kept(probabilities, params)
    allowed = [token for token in range(VOCAB) if stays(token, probabilities.tolist(), params)]
    assert kept.nonzero()[:, 0].tolist() == allowed
    # In the vocabulary's order, each with its own probability.
    assert torch.equal(kept[allowed], probabilities[allowed])
    assert int(probabilities.argmax()) in allowed


def nearly_equal(seed: int) -> tuple[Tensor, Tensor]:
    """Logits twice: two tokens lie 1e-6 apart, in one order and in the other."""
    logits = random_logits(seed)
    first, second = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(seed))[:2].tolist()
    # Likely ones, so that they are drawn.
    logits[first] = logits[second] = logits.max()
    one, other = logits.clone(), logits.clone()
    one[first] += 1e-6
    other[second] += 1e-6
    assert bool(one[first] > one[second])
    assert bool(other[first] < other[second])
    return one, other


@given(st.integers(0, 2**32), filters(), st.sampled_from([0.3, 1.0, 2.0]))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_two_tokens_that_change_places_do_not_change_what_a_seed_draws(
    seed: int, filters: dict[str, float], temperature: float
) -> None:
    params = SamplingParams(temperature=temperature, seed=seed, **filters)
    one, other = nearly_equal(seed)
    kept = [_kept(torch.softmax(row.double() / temperature, dim=0), params) > 0 for row in (one, other)]
    assume(torch.equal(*kept))  # neither is at a border
    generators = [make_generator(params, 0) for _ in range(2)]
    draws = [[choose(row, params, g) for _ in range(10)] for row, g in zip((one, other), generators, strict=True)]
    assert draws[0] == draws[1]


def test_a_token_at_the_border_of_top_k_is_the_only_difference() -> None:
    params = SamplingParams(temperature=1.0, top_k=1)
    one, other = nearly_equal(3)
    for row in (one, other):
        assert choose(row, params, make_generator(params, 0)) == int(row.argmax())
    assert int(one.argmax()) != int(other.argmax())


@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.2}])
def test_tokens_are_drawn_as_often_as_they_are_likely(filters: dict[str, float]) -> None:
    params = SamplingParams(temperature=0.7, seed=5, **filters)
    logits = torch.tensor([0.1, 2.0, -1.0, 1.5, 0.7, 1.0])
    generator = make_generator(params, 0)
    draws = torch.tensor([choose(logits, params, generator) for _ in range(4000)])
    shares = torch.bincount(draws, minlength=6) / 4000
    expected = _kept(torch.softmax(logits.double() / 0.7, dim=0), params)
    assert (shares - expected / expected.sum()).abs().max() < 0.03
    assert not shares[expected == 0].any()


def test_masked_tokens_are_never_drawn() -> None:
    """A constraint hides tokens by minus infinity, all but one at times."""
    params = SamplingParams(temperature=2.0, seed=1, top_p=0.99)
    generator = make_generator(params, 0)
    logits = torch.full((VOCAB,), float("-inf"))
    logits[7] = -40.0
    assert {choose(logits, params, generator) for _ in range(10)} == {7}
    logits[9] = -40.0
    assert {choose(logits, params, generator) for _ in range(30)} == {7, 9}
