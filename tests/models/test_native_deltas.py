"""The compiled products of adapters' deltas against a plain definition and torch's products."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from midstream.adapters.weights import LoraWeights
from midstream.models.deltas import DeltaContext, DeltaGroup, Part
from midstream.models.native.deltas import FactorTables
from tests.models.native import DTYPES, assert_follows, native, needs_compiler, random, threads

pytestmark = needs_compiler
# A joined product whose parts are no multiples of 16 wide.
PARTS = (Part("q", 0, 40), Part("k", 40, 16), Part("v", 56, 7))
WIDTH = 63
# Wider than what is one unit of work.
WIDE = (Part("gate", 0, 300), Part("up", 300, 129))
ROUNDING = 2.0**-8


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


def in_turn(
    adapters: Sequence[Mapping[str, LoraWeights]], counts: Sequence[int], first: int = 0
) -> tuple[list[DeltaGroup], int]:
    """The adapters' rows, one after the other, and where they end."""
    groups = []
    for number, (adapter, count) in enumerate(zip(adapters, counts, strict=True)):
        groups.append(DeltaGroup(f"adapter {number}", first, first + count, adapter))
        first += count
    return groups, first


def expected(
    x: Tensor, y: Tensor, groups: Sequence[DeltaGroup], parts: Sequence[Part] = PARTS
) -> tuple[Tensor, Tensor]:
    """y with the deltas; and by how much bfloat16 may be off, which rounds A x and then the sum."""
    y, off = y.double(), torch.zeros(y.shape, dtype=torch.double)
    for group in groups:
        rows = x[group.start : group.end].double()
        for part in parts:
            if part.path in group.weights:
                found = group.weights[part.path]
                place = slice(group.start, group.end), slice(part.offset, part.offset + part.out)
                down = rows @ found.a.double().t()
                y[place] += found.scale * (down @ found.b.double().t())
                off[place] += abs(found.scale) * ROUNDING * (down.abs() @ found.b.double().abs().t())
    return y, off + ROUNDING * (y.abs() + off)


def assert_added(
    found: Tensor, x: Tensor, before: Tensor, groups: Sequence[DeltaGroup], parts: Sequence[Part] = PARTS
) -> None:
    total, off = expected(x, before, groups, parts)
    if found.dtype == torch.float32:
        assert_follows(found, total)
    else:
        assert bool(((found.double() - total).abs() <= off + 1e-5).all())


def check(
    groups: Sequence[DeltaGroup], *, rows: int, features: int, dtype: torch.dtype, parts: Sequence[Part] = PARTS
) -> None:
    width = sum(part.out for part in parts)
    x, y = random(rows, features, dtype=dtype), random(rows, width, seed=1, dtype=dtype)
    before = y.clone()
    assert native(dtype).add_deltas(x, y, context(groups), parts)
    assert_added(y, x, before, groups, parts)
    owned = {row for group in groups for row in range(group.start, group.end)}
    others = [row for row in range(rows) if row not in owned]
    assert torch.equal(y[others], before[others])
    if dtype == torch.float32:
        context(groups).add(x, before, parts)
        assert_follows(y, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 3, 16, 31, 33, 64])
@pytest.mark.parametrize("count", [*range(1, 10), 12, 13, 25])
def test_one_adapter(count: int, rank: int, dtype: torch.dtype) -> None:
    ranks = {"q": rank, "k": rank, "v": rank}
    check([DeltaGroup("a", 2, 2 + count, weights(ranks, 48, dtype, 1))], rows=count + 3, features=48, dtype=dtype)


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[DeltaGroup], int, int, torch.dtype]:
    """Adapters that each adapt some parts or none, of any ranks; rows of the base before and after them."""
    dtype = draw(st.sampled_from(DTYPES))
    features = draw(st.sampled_from([2, 16, 48, 50] if dtype == torch.bfloat16 else [1, 15, 16, 48, 50]))
    ranks = st.dictionaries(st.sampled_from("qkv"), st.sampled_from([1, 3, 16, 33, 64]))
    adapters = [weights(draw(ranks), features, dtype, seed) for seed in range(draw(st.integers(1, 6)))]
    counts = [draw(st.sampled_from([*range(1, 10), 47, 48, 49, 100])) for _ in adapters]
    groups, end = in_turn(adapters, counts, draw(st.integers(0, 3)))
    return groups, end + draw(st.integers(0, 2)), features, dtype


@given(steps())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_several_adapters(step: tuple[list[DeltaGroup], int, int, torch.dtype]) -> None:
    groups, rows, features, dtype = step
    check(groups, rows=rows, features=features, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", [(65,), (1, 64), (47, 1), (48, 49), (300,), (100, 3, 500)])
def test_many_rows(counts: Sequence[int], dtype: torch.dtype) -> None:
    groups, end = in_turn([weights({"q": 2, "v": 9}, 16, dtype, i) for i in range(len(counts))], counts)
    check(groups, rows=end, features=16, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [128, 255, 512, 513, 900])
def test_high_ranks(rank: int, dtype: torch.dtype) -> None:
    check([DeltaGroup("a", 0, 5, weights({"q": 1, "v": rank}, 16, dtype, 1))], rows=5, features=16, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_wide_products(dtype: torch.dtype) -> None:
    for ranks in ({"gate": 33, "up": 70}, {"up": 3}, {"gate": 1}):
        adapters = [weights(ranks, 200, dtype, seed, WIDE) for seed in (0, 2)]
        groups, end = in_turn(adapters, (7, 60))
        check(groups, rows=end, features=200, dtype=dtype, parts=WIDE)


def test_bfloat16_rounds_between_the_factors_as_pefts_products_do() -> None:
    """A x is (1 + 2⁻⁹, 1), and B takes the difference."""
    for dtype, difference in ((torch.float32, 2.0**-9), (torch.bfloat16, 0.0)):
        a, b = torch.tensor([[1.0, 2.0**-9], [1.0, 0.0]]), torch.tensor([[1.0, -1.0]]).expand(40, 2)
        lora = {"q": LoraWeights(a.to(dtype), b.contiguous().to(dtype), 1.0)}
        y = torch.zeros(3, WIDTH, dtype=dtype)
        assert native(dtype).add_deltas(torch.ones(3, 2, dtype=dtype), y, context([DeltaGroup("a", 0, 2, lora)]), PARTS)
        assert y[:2, :40].unique().tolist() == [difference]
        assert not y[2].any()
        assert not y[:, 40:].any()


def test_odd_inputs_are_declined_in_bfloat16_and_nothing_is_changed() -> None:
    groups = [DeltaGroup("a", 0, 2, weights({"q": 4}, 15, torch.bfloat16, 1))]
    x, y = random(2, 15, dtype=torch.bfloat16), random(2, WIDTH, dtype=torch.bfloat16)
    before = y.clone()
    assert not native(torch.bfloat16).add_deltas(x, y, context(groups), PARTS)
    assert torch.equal(y, before)
    check([DeltaGroup("a", 0, 2, weights({"q": 4}, 15, torch.float32, 1))], rows=2, features=15, dtype=torch.float32)


# ---------------------------------------------------------------------- what is kept of adapters


def test_a_step_after_another_with_the_same_adapters_and_with_others() -> None:
    """What is kept of an adapter serves the next step's rows, and is not taken for other adapters."""
    made = DeltaContext()
    loaded = [weights({"q": 3, "v": 2}, 32, torch.float32, 1), weights({"k": 4}, 32, torch.float32, 2)]
    for step in ([(0, 1), (1, 2)], [(0, 5), (1, 1)], [(1, 5), (0, 100)], [(0, 2), (0, 2)], [(1, 3)]):
        groups, end = in_turn([loaded[which] for which, _ in step], [count for _, count in step])
        made.set(groups)
        # A product of one layer beside one that joins three; and joined in one model, the same layer alone in another.
        for parts in ((Part("k", 0, 16),), PARTS, (Part("q", 0, 40),), (Part("q", 0, 40), Part("v", 40, 7))):
            x, before = random(end, 32), random(end, sum(part.out for part in parts), seed=1)
            y = before.clone()
            assert native().add_deltas(x, y, made, parts)
            assert_added(y, x, before, groups, parts)
        made.set(())


def test_an_adapter_is_packed_once_and_forgotten_with_its_weights() -> None:
    tables = FactorTables([PARTS], 32)
    loaded = [weights({"q": 3, "v": 2}, 32, torch.float32, seed) for seed in (1, 2)]
    packed = [weakref.ref(tables.of(adapter)) for adapter in loaded]
    assert [tables.of(adapter) for adapter in loaded] == [found() for found in packed]
    del loaded[0]
    gc.collect()
    assert packed[0]() is None
    assert packed[1]() is tables.of(loaded[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_that_are_freed_after_a_step_stay_nowhere(dtype: torch.dtype) -> None:
    made, adapter = DeltaContext(), weights({"q": 3, "v": 2}, 32, dtype, 1)
    kept = [weakref.ref(layer) for layer in adapter.values()]
    for count in (3, 70):
        made.set([DeltaGroup("a", 0, count, adapter)])
        assert native(dtype).add_deltas(random(count, 32, dtype=dtype), random(count, WIDTH, dtype=dtype), made, PARTS)
        made.set(())
    del adapter
    gc.collect()
    assert [layer() for layer in kept] == [None] * 3


# ---------------------------------------------------------------------- numbers


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rows_delta_is_the_same_whatever_rows_are_beside_it(dtype: torch.dtype) -> None:
    """And whichever adapters own them, on however many threads."""
    mine, other = weights({"q": 33, "v": 2}, 200, dtype, 0), weights({"k": 5, "v": 64}, 200, dtype, 2)
    x, y = random(160, 200, dtype=dtype), random(160, WIDTH, seed=1, dtype=dtype)
    kernels, alone = native(dtype), y.clone()
    for row in range(160):
        assert kernels.add_deltas(x[row : row + 1], alone[row : row + 1], context([DeltaGroup("a", 0, 1, mine)]), PARTS)
    for count in (1, 2):
        with threads(count):
            together = y.clone()
            assert kernels.add_deltas(x, together, context([DeltaGroup("a", 0, 160, mine)]), PARTS)
            assert torch.equal(together, alone)
            for first in (1, 13, 60):
                groups, _ = in_turn((other, mine), (first, 160 - first))
                together = y.clone()
                assert kernels.add_deltas(x, together, context(groups), PARTS)
                assert torch.equal(together[first:], alone[first:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_that_are_columns_of_something_wider(dtype: torch.dtype) -> None:
    groups = [DeltaGroup("a", 0, 3, weights({"q": 4}, 32, dtype, 0))]
    x, before = random(3, 80, dtype=dtype)[:, 10:42], random(3, WIDTH, dtype=dtype)
    y = before.clone()
    assert native(dtype).add_deltas(x, y, context(groups), PARTS)
    assert_added(y, x, before, groups)


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
