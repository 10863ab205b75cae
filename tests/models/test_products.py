"""The base model's products by torch: the same for any number of rows, with few kinds of kernel; eight-bit weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from midstream.models.deltas import DeltaContext
from midstream.models.kernels import TorchKernels
from midstream.models.linear import AdapterLinear
from midstream.models.products import (
    Int8Product,
    OneDnnProduct,
    PlainProduct,
    Product,
    can_pack,
    padded_rows,
    quantized,
    torch_product,
)
from tests.models.native import DTYPES, random

CPU = torch.device("cpu")
ROWS = [1, 2, 11, 12, 13, 16, 17, 24, 25, 31, 127, 128, 129, 300]
needs_onednn = pytest.mark.skipif(not can_pack(torch.float32, CPU), reason="needs a torch that is built with oneDNN")
PRODUCTS = [PlainProduct, pytest.param(OneDnnProduct, marks=needs_onednn)]


def layer(bias: bool, out: int = 40, depth: int = 24) -> tuple[Tensor, Tensor | None]:
    return random(out, depth) * depth**-0.5, random(out, seed=1) if bias else None


def worth(weight: Tensor) -> Tensor:
    """What the weight's eight-bit numbers stand for."""
    numbers, scales = quantized(weight)
    return numbers.double() * scales.double()[:, None]


@pytest.mark.parametrize("kind", PRODUCTS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("bias", [False, True])
@torch.inference_mode()
def test_products_are_the_layers_own(kind: Callable[..., Product], rows: int, bias: bool) -> None:
    weight, added = layer(bias)
    x = random(1, rows, 24, seed=2)
    expected = F.linear(x, weight, added)
    for given, wanted in ((x, expected), (x[0], expected[0])):
        found = kind(weight, added)(given)
        assert found.shape == wanted.shape
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("bias", [False, True])
@torch.inference_mode()
def test_eight_bit_products_are_those_of_the_rounded_weight(rows: int, bias: bool, dtype: torch.dtype) -> None:
    weight, added = layer(bias)
    x = random(1, rows, 24, seed=2, dtype=dtype)
    exact = F.linear(x.double(), worth(weight.to(dtype)))
    found = Int8Product(weight.to(dtype), None if added is None else added.to(dtype))(x)
    assert found.dtype == dtype
    assert found.shape == exact.shape
    expected = exact if added is None else exact + added.to(dtype).double()
    # Rounded twice: as a sum of whole numbers, and with its scale and bias.
    unit = 2.0**-8 if dtype == torch.bfloat16 else 0.0
    assert bool(((found.double() - expected).abs() <= unit * (exact.abs() + 1.01 * expected.abs()) + 1e-5).all())


def test_rounding_to_eight_bits_is_off_by_half_a_step_at_most() -> None:
    weight = random(50, 300) * torch.logspace(-6, 6, 50)[:, None]
    numbers, scales = quantized(weight)
    assert numbers.dtype == torch.int8
    assert scales.dtype == torch.float32
    off = (worth(weight) - weight.double()).abs()
    assert bool((off <= scales.double()[:, None] * 0.50001).all())
    # The largest of an output's weights takes the whole of the eight bits, and more than a few do not.
    assert numbers.abs().amax(dim=1).tolist() == [127] * 50
    assert len(numbers.unique()) > 200


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_output_whose_weights_are_zero_stays_zero(dtype: torch.dtype) -> None:
    weight = random(4, 16, dtype=dtype)
    weight[[0, 2]] = 0
    numbers, scales = quantized(weight)
    assert not numbers[[0, 2]].any()
    assert bool((scales > 0).all())
    found = Int8Product(weight, None)(random(3, 16, seed=1, dtype=dtype))
    assert not found[:, [0, 2]].any()
    assert bool(found[:, [1, 3]].all())


def test_which_product_torch_has_for_a_weight() -> None:
    weight = random(8, 8)
    assert isinstance(torch_product(weight, None, None), OneDnnProduct if can_pack(weight.dtype, CPU) else PlainProduct)
    assert isinstance(torch_product(weight.double(), None, None), PlainProduct)
    assert isinstance(torch_product(weight, None, "int8"), Int8Product)


@torch.inference_mode()
def test_layers_that_read_the_same_input_are_one_product() -> None:
    """A bias that only some of them have is zero for the others."""
    layers = {"q": nn.Linear(24, 40), "k": nn.Linear(24, 7, bias=False), "v": nn.Linear(24, 16)}
    x = random(1, 5, 24)
    joined = AdapterLinear(layers, DeltaContext(), TorchKernels())
    assert [tuple(part) for part in joined.parts] == [("q", 0, 40), ("k", 40, 7), ("v", 47, 16)]
    assert list(joined.parameters()) == []
    torch.testing.assert_close(joined(x), torch.cat([own(x) for own in layers.values()], dim=-1))


def test_all_steps_of_512_rows_need_few_kinds_of_products() -> None:
    kinds = {padded_rows(rows) for rows in range(1, 513)}
    assert len(kinds) == 68
    assert all(rows <= padded_rows(rows) < rows + 16 for rows in range(1, 513))
