"""The compiled kernel of adapters' deltas against a plain definition and torch's products."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from midstream.adapters.weights import LoraWeights
from midstream.models.deltas import DeltaContext, DeltaGroup, Part
from tests.models.native import DTYPES, assert_follows, native, needs_compiler, random

pytestmark = needs_compiler
# A joined product whose parts are no multiples of 16 wide.
PARTS = (Part("q", 0, 40), Part("k", 40, 16), Part("v", 56, 7))
WIDTH = 63


def weights(
    ranks: Mapping[str, int], features: int, dtype: torch.dtype, seed: int, parts: Sequence[Part] = PARTS
) -> dict[str, LoraWeights]:
    """Of the parts that `ranks` names, and of a layer in another product: no adapter is empty."""
    found = {"elsewhere": LoraWeights(torch.ones(1, 1, dtype=dtype), torch.ones(1, 1, dtype=dtype), 1.0)}
    for i, part in enumerate(parts):
        if rank := ranks.get(part.path):
            a = random(rank, features, seed=100 * seed + i, dtype=dtype) * features**-0.5
            b = random(part.out, rank, seed=100 * seed + i + 50, dtype=dtype) * rank**-0.5
            found[part.path] = LoraWeights(a, b, 1.5 - seed)
    return found


def context(groups: Sequence[DeltaGroup]) -> DeltaContext:
    made = DeltaContext()
    made.set(groups)
    return made


def expected(x: Tensor, y: Tensor, groups: Sequence[DeltaGroup], parts: Sequence[Part] = PARTS) -> Tensor:
    y = y.double()
    for group in groups:
        rows = x[group.start : group.end].double()
        for part in parts:
            if part.path in group.weights:
                a, b, scale = group.weights[part.path].a, group.weights[part.path].b, group.weights[part.path].scale
                delta = scale * (rows @ a.double().t() @ b.double().t())
                y[group.start : group.end, part.offset : part.offset + part.out] += delta
    return y


def check(groups: Sequence[DeltaGroup], *, rows: int, features: int, dtype: torch.dtype) -> None:
    x, y = random(rows, features, dtype=dtype), random(rows, WIDTH, seed=1, dtype=dtype)
    before = y.clone()
    assert native(dtype).add_deltas(x, y, context(groups), PARTS)
    assert_follows(y, expected(x, before, groups))
    owned = {row for group in groups for row in range(group.start, group.end)}
    others = [row for row in range(rows) if row not in owned]
    assert torch.equal(y[others], before[others])
    if dtype == torch.float32:
        context(groups).add(x, before, PARTS)
        assert_follows(y, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 3, 16, 64])
@pytest.mark.parametrize("count", range(1, 10))
def test_one_adapter(count: int, rank: int, dtype: torch.dtype) -> None:
    ranks = {"q": rank, "k": rank, "v": rank}
    check([DeltaGroup("a", 2, 2 + count, weights(ranks, 48, dtype, 1))], rows=count + 3, features=48, dtype=dtype)


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[DeltaGroup], int, int, torch.dtype]:
    """Adapters that each adapt some parts or none, of any ranks; rows of the base before and after them."""
    dtype = draw(st.sampled_from(DTYPES))
    features = draw(st.sampled_from([1, 15, 16, 48, 50]))
    start = draw(st.integers(0, 3))
    groups = []
    for seed in range(draw(st.integers(1, 6))):
        ranks = draw(st.dictionaries(st.sampled_from("qkv"), st.sampled_from([1, 3, 16, 64])))
        end = start + draw(st.integers(1, 9))
        groups.append(DeltaGroup(str(seed), start, end, weights(ranks, features, dtype, seed)))
        start = end
    return groups, start + draw(st.integers(0, 2)), features, dtype


@given(steps())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_several_adapters(step: tuple[list[DeltaGroup], int, int, torch.dtype]) -> None:
    groups, rows, features, dtype = step
    check(groups, rows=rows, features=features, dtype=dtype)


def test_a_step_after_another_with_the_same_adapters_and_with_others() -> None:
    """What is kept of a step's adapters serves the next step's rows, and is not taken for other adapters."""
    made = DeltaContext()
    loaded = [weights({"q": 3, "v": 2}, 32, torch.float32, 1), weights({"k": 4}, 32, torch.float32, 2)]
    for step in ([(0, 1), (1, 2)], [(0, 5), (1, 1)], [(1, 5), (0, 1)], [(0, 2), (0, 2)], [(1, 3)]):
        groups, start = [], 0
        for which, count in step:
            groups.append(DeltaGroup(f"adapter {which}", start, start + count, loaded[which]))
            start += count
        made.set(groups)
        # A product of one layer beside one that joins three.
        for parts in ((Part("k", 0, 16),), PARTS):
            x, y = random(start, 32), random(start, sum(part.out for part in parts), seed=1)
            total = expected(x, y, groups, parts)
            assert native().add_deltas(x, y, made, parts)
            assert_follows(y, total)
        made.set(())


@pytest.mark.parametrize("counts", [(65,), (1, 64), (33, 32), (100, 3)])
def test_more_than_64_rows_are_declined_and_nothing_is_changed(counts: Sequence[int]) -> None:
    groups, start = [], 0
    for i, count in enumerate(counts):
        groups.append(DeltaGroup(str(i), start, start + count, weights({"q": 2}, 16, torch.float32, i)))
        start += count
    x, y = random(start, 16), random(start, WIDTH)
    before = y.clone()
    made = context(groups)
    assert not native().add_deltas(x, y, made, PARTS)
    assert torch.equal(y, before)
    fewer = [DeltaGroup("0", 0, 64, groups[0].weights)]
    check(fewer, rows=start, features=16, dtype=torch.float32)


def test_ranks_beyond_512_are_declined_and_nothing_is_changed() -> None:
    for rank, served in ((512, True), (513, False)):
        groups = [DeltaGroup("a", 0, 2, weights({"q": 1, "v": rank}, 16, torch.float32, 1))]
        x, y = random(2, 16), random(2, WIDTH)
        before = y.clone()
        assert native().add_deltas(x, y, context(groups), PARTS) == served
        assert served or torch.equal(y, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_that_are_columns_of_something_wider(dtype: torch.dtype) -> None:
    groups = [DeltaGroup("a", 0, 3, weights({"q": 4}, 32, dtype, 0))]
    x, y = random(3, 80, dtype=dtype)[:, 10:42], random(3, WIDTH, dtype=dtype)
    total = expected(x, y, groups)
    assert native(dtype).add_deltas(x, y, context(groups), PARTS)
    assert_follows(y, total)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_in_its_row(dtype: torch.dtype) -> None:
    groups = [DeltaGroup("a", 0, 6, weights({"q": 4, "v": 3}, 32, dtype, 0))]
    x, y = random(6, 32, dtype=dtype), random(6, WIDTH, dtype=dtype)
    x[3, 7] = float("nan")
    assert native(dtype).add_deltas(x, y, context(groups), PARTS)
    bad = y.isnan()
    assert bad[3, :40].all()
    assert bad[3, 56:].all()
    assert not bad[3, 40:56].any()
    assert not bad[[0, 1, 2, 4, 5]].any()
