"""The compiled products of packed weights against plain definitions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from midstream.models.native.products import PackedProduct
from midstream.models.products import Held, Int8Weight, Product, WeightKind, quantized
from tests.models.native import DTYPES, assert_follows, native, needs_compiler, packed, random, threads

pytestmark = needs_compiler
ROWS = (1, 2, 11, 12, 13, 24, 25, 31, 127, 300)
OUTS = (1, 7, 31, 32, 33, 40, 64, 100)
KINDS: tuple[WeightKind | None, ...] = (None, "int8")


def layer(out: int, depth: int, dtype: torch.dtype, bias: bool = True) -> tuple[Tensor, Tensor | None]:
    added = random(out, seed=1, dtype=dtype) if bias else None
    return (random(out, depth) * depth**-0.5).to(dtype), added


def exact(x: Tensor, weight: Tensor, bias: Tensor | None, kind: WeightKind | None = None) -> Tensor:
    if kind == "int8":
        numbers, scales = quantized(weight)
        weight = numbers.double() * scales.double()[:, None]
    return F.linear(x.double(), weight.double(), None if bias is None else bias.double())


def check(rows: int, depth: int, out: int, dtype: torch.dtype, *, bias: bool, kind: WeightKind | None = None) -> None:
    weight, added = layer(out, depth, dtype, bias)
    x = random(rows, depth, seed=2, dtype=dtype)
    before = x.clone()
    found = packed(weight, added, kind)(x)
    assert found.dtype == dtype
    assert torch.equal(x, before)
    # Float32's sums of many numbers are off by more.
    assert_follows(found, exact(x, weight, added, kind), atol=1e-5 if depth < 10_000 else 5e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", ROWS)
def test_any_number_of_rows_and_outputs(rows: int, bias: bool, kind: WeightKind | None, dtype: torch.dtype) -> None:
    for out in OUTS:
        check(rows, 50, out, dtype, bias=bias, kind=kind)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [2, 4, 6, 8, 14, 30, 1000])
def test_any_even_depth(depth: int, kind: WeightKind | None, dtype: torch.dtype) -> None:
    for rows in (1, 5, 40):
        check(rows, depth, 40, dtype, bias=True, kind=kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [1, 3, 7, 33, 501])
def test_odd_depths_in_float32(depth: int, kind: WeightKind | None) -> None:
    for rows in (1, 13, 30):
        check(rows, depth, 40, torch.float32, bias=True, kind=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_odd_depths_in_bfloat16_are_left_to_torch(kind: WeightKind | None) -> None:
    weight, bias = layer(40, 33, torch.bfloat16)
    product: Product = native(torch.bfloat16).product(weight, bias, kind)
    assert not isinstance(product, PackedProduct)
    x = random(5, 33, seed=2, dtype=torch.bfloat16)
    torch.testing.assert_close(product(x).double(), exact(x, weight, bias, kind), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_where_the_processor_has_wide_registers(dtype: torch.dtype) -> None:
    """Torch's own where it has not: packing costs memory and time, and pays by them alone."""
    has = bool(native(dtype)._library.midstream_has_products())
    product = native(dtype).product(*layer(40, 32, dtype), None)
    assert isinstance(product, PackedProduct) == has
    flags = torch.backends.cpu.get_cpu_capability()
    assert has or "AVX512" not in flags or dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "depth"), [(128, 4096), (700, 1024), (131, 2050), (25, 30_000), (24, 30_000)])
def test_rows_beyond_what_a_core_caches(rows: int, depth: int, kind: WeightKind | None, dtype: torch.dtype) -> None:
    """Several blocks of rows; in the last ones, as few rows as there can be."""
    assert rows * depth * 2 > 512 * 1024
    check(rows, depth, 33, dtype, bias=True, kind=kind)


@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_of_any_shape_and_layout(dtype: torch.dtype) -> None:
    weight, bias = layer(40, 24, dtype)
    product = packed(weight, bias)
    wide = random(10, 80, seed=2, dtype=dtype)
    inputs = (
        wide[:, 3:27],
        wide[::3, 10:34],
        wide[:, 1:49:2],
        random(24, 7, seed=3, dtype=dtype).t(),
        random(1, 9, 24, seed=4, dtype=dtype),
        random(3, 24, 5, seed=5, dtype=dtype).transpose(1, 2),
        random(24, seed=6, dtype=dtype),
        wide[:0, :24],
    )
    for x in inputs:
        found = product(x)
        assert found.shape == (*x.shape[:-1], 40)
        assert_follows(found, exact(x, weight, bias))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_rows_result_is_the_same_whatever_rows_are_beside_it(kind: WeightKind | None, dtype: torch.dtype) -> None:
    """So that a token's KV does not depend on what else was in its step."""
    product = packed(*layer(70, 1000, dtype), kind)
    x = random(700, 1000, seed=2, dtype=dtype)
    every = product(x)
    for count in (1, 2, 3, 5, 11, 12, 13, 25, 100):
        for first in (0, 17, 699 - 100):
            assert torch.equal(product(x[first : first + count]), every[first : first + count])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 12, 13, 40])
def test_outputs_of_eight_bit_weights_that_are_zero(rows: int, dtype: torch.dtype) -> None:
    weight, bias = layer(40, 50, dtype)
    assert bias is not None
    weight[[0, 33, 39]] = 0
    found = packed(weight, bias, "int8")(random(rows, 50, seed=2, dtype=dtype))
    for out in (0, 33, 39):
        assert bool((found[:, out] == bias[out]).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_in_its_row(kind: WeightKind | None, dtype: torch.dtype) -> None:
    for rows in (5, 30):
        x = random(rows, 50, seed=2, dtype=dtype)
        x[3, 7] = float("nan")
        bad = packed(*layer(40, 50, dtype), kind)(x).isnan()
        assert bool(bad[3].all())
        assert int(bad.sum()) == 40


@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_given_is_not_needed_any_more(kind: WeightKind | None) -> None:
    weight, bias = layer(64, 32, torch.float32, bias=False)
    product, x = packed(weight, bias, kind), random(3, 32, seed=2)
    before = product(x)
    weight.zero_()
    assert torch.equal(product(x), before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_eight_bit_number_is_multiplied_exactly(dtype: torch.dtype) -> None:
    """Each by itself, in every place of a step: 32 columns, two in depth."""
    numbers = torch.arange(-127, 128, dtype=torch.int8)
    depth, out = 2, 64
    for rows in (1, 7, 40):
        for number in numbers.tolist():
            weight = Int8Weight(torch.full((out, depth), number, dtype=torch.int8), torch.ones(out))
            product = PackedProduct(native(dtype)._library, dtype, Held(weight, None, True))
            x = torch.tensor([[1.0, 2.0], [1.0, 0.0], [0.0, 1.0]], dtype=dtype).repeat(14, 1)[:rows]
            assert torch.equal(product(x), number * x.float().sum(1, keepdim=True).expand(rows, out))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_threads_does_all_of_a_product(kind: WeightKind | None, dtype: torch.dtype) -> None:
    """More of them than panels, than cores, and so many that some are without work and take that of others."""
    for rows, out in ((1, 33), (1, 1000), (13, 500), (900, 70)):
        weight, bias = layer(out, 576, dtype)
        product, x = packed(weight, bias, kind), random(rows, 576, seed=2, dtype=dtype)
        with threads(1):
            expected = product(x)
        for count in (2, 3, 5, 16):
            with threads(count):
                for _ in range(20):
                    assert torch.equal(product(x), expected)
