"""Keys and values in eight bits: what rounding keeps of them, and how much memory they take."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from midstream.models.kernels import TorchKernels
from midstream.models.kv import LayerKV, rounded
from midstream.models.pool import KVPool
from tests.models.native import DTYPES, native, needs_compiler, random, threads
from tests.models.test_native import positions

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def eight_bits(heads: int, slots: int, dim: int) -> LayerKV:
    """Numbers that no write gives."""
    kv = LayerKV.empty(heads, slots, dim, torch.float32, CPU, "int8")
    for tensor in kv:
        assert tensor is not None
        tensor.fill_(-128 if tensor.dtype == torch.int8 else -1.0)
    return kv


def assert_rounded(numbers: Tensor, scales: Tensor, exact: Tensor) -> None:
    """Each vector's largest takes the whole of the bits, and each number is off by at most half of one's worth."""
    largest = exact.double().abs().amax(-1)
    torch.testing.assert_close(scales.double(), largest / 127, rtol=1e-6, atol=0)
    assert bool((numbers.int().abs().amax(-1) == 127).all())
    error = (numbers.double() * scales[..., None].double() - exact.double()).abs()
    # Half a unit, and the float32 errors of what is divided by what.
    assert bool((error <= scales[..., None].double() * (0.5 + 1e-4)).all())


def test_rounding_is_off_by_half_a_unit_at_most() -> None:
    sizes = torch.tensor([1e-30, 1e-4, 1.0, 300.0, 1e30])[:, None, None]
    exact = random(5, 200, 64) * sizes
    assert_rounded(*rounded(exact), exact)


def test_vectors_of_nought_stay_nought() -> None:
    numbers, scales = rounded(torch.zeros(2, 3, 8))
    assert not numbers.any()
    assert not scales.any()


@pytest.mark.parametrize("size", [1e-38, 1e-40, 1e-43, 1e-45])
def test_numbers_too_small_for_a_scale_do_not_overflow(size: float) -> None:
    exact = random(4, 32).abs() * size
    numbers, scales = rounded(exact)
    assert int(numbers.min()) >= 0
    assert bool((numbers * scales[:, None] <= 2 * exact.amax()).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_vector_that_is_not_finite_is_worth_nan(bad: float) -> None:
    exact = random(3, 8)
    exact[1, 2] = bad
    numbers, scales = rounded(exact)
    assert scales.isnan().tolist() == [False, True, False]
    assert_rounded(numbers[[0, 2]], scales[[0, 2]], exact[[0, 2]])


def test_what_is_written_is_read() -> None:
    kv, slots = eight_bits(2, 9, 16), torch.tensor([7, 0, 3])
    key, value = random(2, 3, 16), random(2, 3, 16, seed=1)
    kv.write(slots, key, value)
    for found, expected in zip(kv.read(slots, torch.float32), (key, value), strict=True):
        assert float((found - expected).abs().max()) < 0.02
    for found, other in zip(kv.read(slots, torch.bfloat16), kv.read(slots, torch.float32), strict=True):
        assert torch.equal(found, other.bfloat16())
    for found, other in zip(
        kv.read(slice(2, 5), torch.float32), kv.read(torch.arange(2, 5), torch.float32), strict=True
    ):
        assert torch.equal(found, other)
    assert bool((kv.keys[:, [1, 2, 4, 5, 6, 8]] == -128).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [None, "int8"])
def test_bytes_are_those_of_the_tensors(kind: None, dtype: torch.dtype) -> None:
    shapes = [(2, 32), (3, 64), (1, 8)]
    pool = KVPool(shapes, 10, dtype, CPU, kind)
    held = sum(tensor.nbytes for kv in pool.layers for tensor in kv if tensor is not None)
    assert held == 10 * KVPool.bytes_per_slot(shapes, dtype, kind)


def test_heads_of_64_take_little_more_than_half_of_bfloat16() -> None:
    whole, half = (KVPool.bytes_per_slot([(4, 64)], torch.bfloat16, kind) for kind in (None, "int8"))
    assert half / whole == pytest.approx(68 / 128)


# ---------------------------------------------------------------------- the compiled kernel that writes them


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [32, 64, 96, 128, 256])
def test_rotation_rounds_into_its_slots_and_no_others(dim: int, dtype: torch.dtype) -> None:
    """From the rotated numbers as they are in float32, whatever the model's type."""
    rows, heads, kv_heads = 7, 4, 2
    slots = torch.tensor([9, 2, 30, 4, 0, 17, 18])
    qkv, turning = random(rows, (heads + 2 * kv_heads) * dim, dtype=dtype), positions(rows, dim, dtype)
    exact = LayerKV.empty(kv_heads, 31, dim, torch.float32, CPU, None)
    TorchKernels().rotate(qkv.float(), *(part.float() for part in turning), exact, slots)
    plain = LayerKV.empty(kv_heads, 31, dim, dtype, CPU, None)
    kv = eight_bits(kv_heads, 31, dim)
    query = native(dtype).rotate(qkv, *turning, kv, slots)
    assert torch.equal(query, native(dtype).rotate(qkv, *turning, plain, slots))
    assert kv.key_scales is not None
    assert kv.value_scales is not None
    assert_rounded(kv.keys[:, slots], kv.key_scales[:, slots], exact.keys[:, slots])
    assert_rounded(kv.values[:, slots], kv.value_scales[:, slots], exact.values[:, slots])
    others = [slot for slot in range(31) if slot not in slots.tolist()]
    assert bool((kv.keys[:, others] == -128).all())
    assert bool((kv.values[:, others] == -128).all())
    assert bool((kv.key_scales[:, others] == -1).all())
    assert bool((kv.value_scales[:, others] == -1).all())


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotation_rounds_numbers_far_from_the_usual(dtype: torch.dtype) -> None:
    """Nought, numbers of few bits, and such as are none; as torch does."""
    qkv = random(5, 4 * 32, dtype=torch.float32)
    qkv[0] = 0
    qkv[1] *= 1e-40
    qkv[2, 70] = float("nan")
    qkv[3, 100] = float("inf")
    qkv = qkv.to(dtype)
    plain_turning = torch.ones(5, 32, dtype=dtype), torch.zeros(5, 32, dtype=dtype)
    slots = torch.arange(5)
    found, expected = eight_bits(1, 5, 32), eight_bits(1, 5, 32)
    native(dtype).rotate(qkv, *plain_turning, found, slots)
    TorchKernels().rotate(qkv, *plain_turning, expected, slots)
    for mine, theirs in ((found.key_scales, expected.key_scales), (found.value_scales, expected.value_scales)):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)
    assert found.key_scales is not None
    assert found.key_scales.isnan().tolist() == [[False, False, True, False, False]]
    for place in (0, 1, 4):
        assert torch.equal(found.keys[:, place], expected.keys[:, place])
        assert torch.equal(found.values[:, place], expected.values[:, place])


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_rounded_alike_in_one_chunk_or_many(dtype: torch.dtype) -> None:
    rows, dim = 300, 64
    qkv, (cosine, sine), slots = random(rows, 4 * dim, dtype=dtype), positions(rows, dim, dtype), torch.arange(rows)
    whole, pieces = eight_bits(1, rows, dim), eight_bits(1, rows, dim)
    with threads(2):
        native(dtype).rotate(qkv, cosine, sine, whole, slots)
    with threads(1):
        for piece in slots.split(37):
            native(dtype).rotate(qkv[piece], cosine[piece], sine[piece], pieces, piece)
    for mine, theirs in zip(whole, pieces, strict=True):
        assert mine is not None
        assert torch.equal(mine, theirs)
