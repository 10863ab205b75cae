"""The fixed table of adapters' factors: what is filled in, and when a column is made anew."""

from __future__ import annotations

import torch

from midstream.adapters.weights import LoraWeights
from midstream.models.cuda.factors import FixedFactors, owners_of, product_factors
from midstream.models.deltas import DeltaGroup, Part
from tests.models.native import random

PRODUCTS = ((Part("q", 0, 8), Part("k", 8, 4)), (Part("o", 0, 6),))
CPU = torch.device("cpu")


def weights(path: str, rank: int, scale: float = 0.5) -> dict[str, LoraWeights]:
    return {path: LoraWeights(random(rank, 5), random(8, rank), scale)}


def group(digest: str, found: dict[str, LoraWeights], start: int = 0) -> DeltaGroup:
    return DeltaGroup(digest, start, start + 1, found)


def test_a_filled_table_has_each_adapters_numbers_in_the_products_views() -> None:
    fixed = FixedFactors(PRODUCTS, 3, CPU)
    one, two = weights("k", 24), weights("o", 8)
    views = fixed.products(32)
    groups = [group("one", one), group("two", two, 1)]
    assert fixed.rank_block(groups) == 32
    fixed.fill(groups)
    assert views["q"].table[1, 0, :3].tolist() == [one["k"].a.data_ptr(), one["k"].b.data_ptr(), 24]
    assert views["q"].table[:, :, 2].tolist() == [[0, 0, 0], [24, 0, 0]]
    assert views["o"].table[0, :, 2].tolist() == [0, 8, 0]
    assert views["o"].table[0, 1, 3:].view(torch.float64).item() == 0.5
    assert views["q"].parts.tolist() == [[0, 0, 8], [1, 8, 4]]
    assert (views["q"].widest, views["o"].widest) == (8, 6)
    # In another order, and with fewer: the same memory says so.
    fixed.fill([group("two", two)])
    assert views["q"].table[:, :, 2].tolist() == [[0, 0, 0], [0, 0, 0]]
    assert views["o"].table[0, :, 2].tolist() == [8, 0, 0]


def test_the_same_digest_with_other_tensors_is_another_column() -> None:
    fixed = FixedFactors(PRODUCTS, 2, CPU)
    old, new = weights("q", 8), weights("q", 8)
    table = fixed.products(16)["q"].table
    fixed.fill([group("a", old)])
    fixed.fill([group("a", new)])
    assert table[0, 0, 0] == new["q"].a.data_ptr()


def test_factors_that_are_no_plain_matrices_are_copied_and_kept() -> None:
    fixed = FixedFactors(PRODUCTS, 1, CPU)
    a, b = random(5, 8).t(), random(8, 8).t()
    fixed.fill([group("a", {"q": LoraWeights(a, b, 1.0)})])
    address = int(fixed.products(16)["q"].table[0, 0, 0])
    assert address != a.data_ptr()
    (kept,) = [tensor for tensor in fixed._filled[0].kept if tensor.data_ptr() == address]
    assert torch.equal(kept, a)


def test_rows_of_the_base_model_have_no_owner() -> None:
    groups = [DeltaGroup("a", 2, 4, {}), DeltaGroup("b", 4, 5, {})]
    assert owners_of(groups, 0, 7).tolist() == [-1, -1, 0, 0, 1, -1, -1]


def test_ranks_are_filled_up_with_zeros_to_a_multiple_of_eight() -> None:
    factor = LoraWeights(random(3, 5), random(4, 3), 1.0)
    found = product_factors([group("a", {"k": factor})], PRODUCTS[0], CPU)
    a, b = found.kept
    assert found.table[1, 0, :3].tolist() == [a.data_ptr(), b.data_ptr(), 8]
    assert torch.equal(b @ a, factor.b @ factor.a)
