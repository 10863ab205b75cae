"""The Triton programs against what they compute, by torch in float64 or by definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from midstream.adapters.weights import LoraWeights
from midstream.models.attention import attend
from midstream.models.attention_plan import AttentionPlan, Range, RowSegment
from midstream.models.cuda.buckets import step_bucket
from midstream.models.cuda.factors import product_factors, row_owners
from midstream.models.cuda.kernels import CudaKernels
from midstream.models.cuda.tables import DeviceTables, build_tables
from midstream.models.deltas import DeltaContext, DeltaGroup, Part
from midstream.models.kernels import TorchKernels
from midstream.models.kv import LayerKV
from tests.models.cuda.plain import MULTIPROCESSORS, a_step, plain_kernels
from tests.models.cuda.triton import DEVICE, HALF, needs_triton, triton_programs
from tests.models.native import random

pytestmark = needs_triton
DTYPES = (torch.float32, HALF)
BOUND = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.fixture(scope="module")
def programs() -> Any:
    return triton_programs()


@pytest.fixture(scope="module")
def kernels(programs: Any) -> CudaKernels:
    return CudaKernels(programs, MULTIPROCESSORS)


def near(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    torch.testing.assert_close(found.double().cpu(), expected.double().cpu(), rtol=BOUND[dtype], atol=BOUND[dtype])


def inputs(heads: int, kv_heads: int, dim: int, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Query, keys and values; slots that no row sees hold not-a-numbers."""
    query = random(heads, rows, dim).to(DEVICE, dtype)
    keys, values = (random(kv_heads, 1000, dim, seed=seed).to(DEVICE, dtype) for seed in (1, 2))
    for numbers in (keys, values):
        numbers[:, 898:] = float("nan")
    return query, keys, values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("shape", [(6, 2, 48), (4, 1, 128), (3, 3, 64)], ids=str)
def test_attention_of_a_mixed_step(
    kernels: CudaKernels, shape: tuple[int, int, int], window: int | None, dtype: torch.dtype
) -> None:
    segments, rows = a_step()
    query, keys, values = inputs(*shape, rows, dtype)
    found = attend(query, LayerKV(keys, values), AttentionPlan(segments, dtype, DEVICE, rows), kernels, 0.2, window)
    exact = AttentionPlan(segments, torch.float32, torch.device("cpu"), rows)
    wide = [numbers.float().cpu() for numbers in (query, keys, values)]
    near(found, attend(wide[0], LayerKV(*wide[1:]), exact, TorchKernels(), 0.2, window), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_in_padded_tables_leaves_zeros_for_rows_that_see_nothing(
    kernels: CudaKernels, programs: Any, dtype: torch.dtype
) -> None:
    segments = tuple(RowSegment(i, 1, 300 + i, 400 + i, (Range(0, 250, 0), Range(350, 51 + i, 250))) for i in range(5))
    query, keys, values = inputs(4, 2, 64, 8, dtype)
    tiling = kernels.tiling(4, 2, 64, dtype)
    assert tiling is not None
    tables = build_tables(segments, 5, tiling, None)
    bucket = step_bucket([(tables, tiling)], 5, 0)
    assert bucket is not None
    numbers = torch.from_numpy(tables.packed(bucket.tables[0])).to(DEVICE)
    padded = DeviceTables.over(numbers, bucket.tables[0], direct=False)
    found = programs.attend(query, keys, values, padded, 0.2)
    wide = [numbers.float().cpu() for numbers in (query[:, :5], keys, values)]
    exact = plain_kernels()._programs.attend(*wide, DeviceTables.of(tables, torch.device("cpu")), 0.2)
    near(found[:5], exact, dtype)
    assert not found[5:].any()


def test_attention_of_a_transposed_query(kernels: CudaKernels) -> None:
    segments, rows = a_step()
    query, keys, values = inputs(6, 2, 32, rows, torch.float32)
    packed = query.transpose(0, 1).contiguous()
    plan = AttentionPlan(segments, torch.float32, DEVICE, rows)
    expected = attend(query, LayerKV(keys, values), plan, kernels, 0.2, None)
    near(attend(packed.transpose(0, 1), LayerKV(keys, values), plan, kernels, 0.2, None), expected, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", [32, 72, 1000])
def test_norms(kernels: CudaKernels, features: int, dtype: torch.dtype) -> None:
    x, update = (random(5, features, seed=seed).to(DEVICE, dtype) for seed in (0, 1))
    weight = random(features, seed=2).to(DEVICE, dtype)
    near(kernels.norm(x, weight, 1e-5), TorchKernels().norm(x.double(), weight.double(), 1e-5), dtype)
    summed = x.clone()
    found = kernels.add_norm(summed, update, 0.3, weight, 1e-5)
    near(summed, x.double() + 0.3 * update.double(), dtype)
    near(found, TorchKernels().norm(summed.double(), weight.double(), 1e-5), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [32, 48, 128])
def test_rotation_and_the_write_to_the_pool(kernels: CudaKernels, dim: int, dtype: torch.dtype) -> None:
    heads, kv_heads, rows = 6, 2, 5
    qkv = random(rows, (heads + 2 * kv_heads) * dim).to(DEVICE, dtype)
    angles = random(rows, dim // 2, seed=1).repeat(1, 2)
    cosine, sine = angles.cos().to(DEVICE, dtype), angles.sin().to(DEVICE, dtype)
    slots = torch.tensor([7, 3, 4, 0, 9], device=DEVICE)
    before = random(2, kv_heads, 11, dim, seed=2).to(DEVICE, dtype)
    ours, exact = before.clone(), before.double()
    query = kernels.rotate(qkv, cosine, sine, LayerKV(*ours), slots)
    expected = TorchKernels().rotate(qkv.double(), cosine.double(), sine.double(), LayerKV(*exact), slots)
    near(query, expected, dtype)
    near(ours, exact, dtype)
    others = [1, 2, 5, 6, 8, 10]
    assert torch.equal(ours[:, :, others], before[:, :, others])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [72, 2500])
def test_the_gate(kernels: CudaKernels, width: int, dtype: torch.dtype) -> None:
    both = random(3, 2 * width).to(DEVICE, dtype)
    near(kernels.gated(both), TorchKernels().gated(both.double()), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deltas_of_mixed_ranks_and_missing_layers(kernels: CudaKernels, dtype: torch.dtype) -> None:
    parts = (Part("q", 0, 40), Part("k", 40, 24), Part("v", 64, 200))
    groups = [
        DeltaGroup("a", 2, 5, {p.path: factors(p, rank=3, seed=1, dtype=dtype) for p in parts}),
        DeltaGroup("b", 5, 6, {"v": factors(parts[2], rank=40, seed=2, dtype=dtype)}),
        DeltaGroup("c", 6, 7, {}),
    ]
    x, y = random(9, 80, seed=3).to(DEVICE, dtype), random(9, 264, seed=4).to(DEVICE, dtype)
    context = DeltaContext()
    context.set(groups)
    expected = y.double()
    for group in groups:
        for part in parts:
            if (weights := group.weights.get(part.path)) is not None:
                delta = x[group.start : group.end].double() @ weights.a.double().t() @ weights.b.double().t()
                expected[group.start : group.end, part.offset : part.offset + part.out] += delta * weights.scale
    found = y.clone()
    assert kernels.add_deltas(x, found, context, parts)
    near(found, expected, dtype)
    assert torch.equal(found[[0, 1, 6, 7, 8]], y[[0, 1, 6, 7, 8]])


def factors(part: Part, *, rank: int, seed: int, dtype: torch.dtype) -> LoraWeights:
    a, b = random(rank, 80, seed=seed) * 0.1, random(part.out, rank, seed=seed + 10) * 0.1
    return LoraWeights(a.to(DEVICE, dtype), b.to(DEVICE, dtype), 0.5 + seed)


def test_the_factors_of_a_product() -> None:
    parts = (Part("q", 0, 4), Part("k", 4, 2))
    weights = factors(parts[1], rank=17, seed=1, dtype=torch.float32)
    groups = [DeltaGroup("a", 3, 5, {"k": weights})]
    found = product_factors(groups, parts, DEVICE)
    assert found.table[0].tolist() == [[0] * 4]
    assert found.table[1, 0, :3].tolist() == [found.kept[0].data_ptr(), found.kept[1].data_ptr(), 24]
    assert torch.equal(found.kept[0][:17], weights.a)
    assert torch.equal(found.kept[1][:, :17], weights.b)
    assert not found.kept[0][17:].any()
    assert (found.widest, found.rank_block) == (4, 32)
    owners = row_owners(groups, DEVICE)
    assert (owners.start, owners.end, owners.numbers.tolist()) == (3, 5, [0, 0])
