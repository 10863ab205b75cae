"""The compiled kernels of norms, rotary positions, gates and attention against plain definitions."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from midstream.models.extents import ExtentBuilder, ExtentCall
from midstream.models.kernels import TorchKernels
from midstream.models.kv import KVKind, LayerKV
from tests.models.native import (
    DTYPES,
    KV_KINDS,
    PlainKernels,
    assert_attends,
    assert_follows,
    held,
    native,
    needs_compiler,
    random,
)

pytestmark = [needs_compiler, pytest.mark.usefixtures("no_gradients")]
ODD_WIDTHS = (1, 8, 15, 16, 17, 33, 64, 100)


@pytest.fixture
def no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def plain_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


# ---------------------------------------------------------------------- norms


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", ODD_WIDTHS)
@pytest.mark.parametrize("rows", [1, 5])
def test_norm(rows: int, dim: int, dtype: torch.dtype) -> None:
    sizes = torch.tensor([1e-4, 1.0, 300.0, 1e-2, 7.0])[:rows, None]
    x, weight = (random(rows, dim) * sizes).to(dtype), random(dim, seed=1, dtype=dtype)
    before = x.clone()
    found = native(dtype).norm(x, weight, 1e-5)
    assert found.dtype == dtype
    assert torch.equal(x, before)
    assert_follows(found, plain_norm(x, weight, 1e-5))
    if dtype == torch.float32:
        assert_follows(found, TorchKernels().norm(x, weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", ODD_WIDTHS)
@pytest.mark.parametrize("alpha", [1.0, 0.22, -3.0])
def test_add_norm_adds_in_place(alpha: float, dim: int, dtype: torch.dtype) -> None:
    x, update, weight = (random(*shape, seed=i, dtype=dtype) for i, shape in enumerate([(3, dim), (3, dim), (dim,)]))
    total, kept = x.double() + alpha * update.double(), update.clone()
    place = x.data_ptr()
    found = native(dtype).add_norm(x, update, alpha, weight, 1e-6)
    assert x.data_ptr() == place
    assert torch.equal(update, kept)
    assert_follows(x, total)
    # The norm is of the sum as it was stored.
    assert_follows(found, plain_norm(x, weight, 1e-6))


# ---------------------------------------------------------------------- rotary positions


def positions(rows: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angles = torch.arange(rows)[:, None] * 3.7 / 10000 ** (torch.arange(dim // 2) / (dim // 2))
    both = torch.cat((angles, angles), dim=-1)
    return both.cos().to(dtype), both.sin().to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [32, 64, 96, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads", "rows"), [(1, 1, 1), (4, 2, 5), (9, 3, 7), (8, 1, 2)])
def test_rotate_fills_scattered_slots_and_no_others(
    heads: int, kv_heads: int, rows: int, dim: int, dtype: torch.dtype
) -> None:
    num_slots = 4 * rows + 3
    slots = torch.randperm(num_slots, generator=torch.Generator().manual_seed(rows))[:rows]
    qkv = random(rows, (heads + 2 * kv_heads) * dim, dtype=dtype)
    cosine, sine = positions(rows, dim, dtype)
    keys, values = (random(kv_heads, num_slots, dim, seed=i, dtype=dtype) for i in (1, 2))
    expected_keys, expected_values = keys.float(), values.float()
    expected_kv = LayerKV(expected_keys, expected_values)
    expected = TorchKernels().rotate(qkv.float(), cosine.float(), sine.float(), expected_kv, slots)
    old_keys, old_values = keys.clone(), values.clone()
    query = native(dtype).rotate(qkv, cosine, sine, LayerKV(keys, values), slots)
    assert query.is_contiguous()
    assert_follows(query, expected)
    assert_follows(keys, expected_keys)
    assert torch.equal(values.float(), expected_values)
    others = [slot for slot in range(num_slots) if slot not in slots.tolist()]
    assert torch.equal(keys[:, others], old_keys[:, others])
    assert torch.equal(values[:, others], old_values[:, others])


def test_rotate_leaves_other_head_sizes_to_torch() -> None:
    results = []
    for kernels in (native(), TorchKernels()):
        kv = LayerKV(torch.zeros(2, 9, 8), torch.zeros(2, 9, 8))
        turned = kernels.rotate(random(3, 64), *positions(3, 8, torch.float32), kv, torch.tensor([8, 0, 3]))
        results.append((turned, kv.keys, kv.values))
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


# ---------------------------------------------------------------------- gates


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [*ODD_WIDTHS, 1536])
def test_gated(width: int, dtype: torch.dtype) -> None:
    both = (random(3, 2 * width) * torch.tensor([[0.1], [3.0], [40.0]])).to(dtype)
    gate, up = both.double().chunk(2, dim=-1)
    assert_follows(native(dtype).gated(both), F.silu(gate) * up)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 16, 19])
def test_gates_far_from_zero(width: int, dtype: torch.dtype) -> None:
    """A gate that is almost minus infinity gives nothing, one that is almost infinity gives itself."""
    lowest = torch.finfo(dtype).min
    for gate in (lowest, -1e30, -1e6, -200.0, -104.0, -89.0, -88.0, -87.0, -86.0, 86.0, 89.0, 200.0, 1e6, 1e30):
        both = torch.tensor([[gate] * width + [3.0] * width], dtype=dtype)
        expected = F.silu(both[:, :width].double()) * 3
        assert_follows(native(dtype).gated(both), expected, atol=1e-30)
    huge = torch.tensor([[float("inf")] * width + [2.0] * width], dtype=dtype)
    assert native(dtype).gated(huge).isposinf().all()
    native(dtype).gated(-huge)


# ---------------------------------------------------------------------- attention


def check_attention(
    call: ExtentCall,
    *,
    heads: int,
    kv_heads: int,
    dim: int,
    num_slots: int,
    rows: int,
    dtype: torch.dtype,
    kind: KVKind | None = None,
) -> None:
    """Slots that nobody sees hold NaN: it shows where one is read."""
    query = random(heads, rows, dim, dtype=dtype)
    keys, values = (random(kv_heads, num_slots, dim, seed=i, dtype=dtype) for i in (1, 2))
    seen = {slot for start, length, *_ in call.chunks.tolist() for slot in range(start, start + length)}
    unseen = [slot for slot in range(num_slots) if slot not in seen]
    keys[:, unseen] = values[:, unseen] = float("nan")
    scale = dim**-0.5
    kv = held(keys, values, kind)
    found = native(dtype).attend(query, kv, call, scale)
    assert found.dtype == dtype
    assert_attends(found, query, kv, call, scale)
    # As transformers' own layers give it; and a second layer of the same step.
    transposed = query.transpose(0, 1).contiguous().transpose(0, 1)
    again = native(dtype).attend(transposed, kv, call, scale)
    assert torch.equal(again[call.merge_rows], found[call.merge_rows])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KV_KINDS)
@pytest.mark.parametrize("dim", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("group", range(1, 9))
def test_attention_of_all_head_sizes_and_groups(group: int, dim: int, kind: KVKind | None, dtype: torch.dtype) -> None:
    few = ExtentBuilder()
    few.add(400, 255, [0])
    few.add(3, 1, [2, 0])
    few.add(700, 65, [6, 1, 0, 4, 3])
    few.add(60, 4, [1, 2, 3, 4], causal=True)
    few.add(100, 257, [6, 0, 1])
    few.add(66, 1, [9])
    check_attention(few.call(), heads=2 * group, kv_heads=2, dim=dim, num_slots=800, rows=10, dtype=dtype, kind=kind)


@pytest.mark.parametrize("rows", range(1, 33))
def test_attention_of_one_to_32_rows_and_as_many_causal_ones(rows: int) -> None:
    order = torch.randperm(2 * rows, generator=torch.Generator().manual_seed(rows)).tolist()
    few = ExtentBuilder()
    few.add(5, 70, order[:rows])
    few.add(80, 30, order[rows - 1 :])
    if rows > 1:
        few.add(120, rows, list(range(rows)), causal=True)
    check_attention(few.call(), heads=2, kv_heads=1, dim=32, num_slots=160, rows=2 * rows, dtype=torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [63, 64, 65, 255, 256, 257, 511, 512, 513, 64 * 256, 64 * 256 + 1, 20_000])
def test_ranges_around_the_size_of_chunks_and_beyond_64_of_them(length: int, dtype: torch.dtype) -> None:
    few = ExtentBuilder()
    few.add(2, length, [0, 2])
    call = few.call()
    assert len(call.chunks) == min(64, -(-length // 256))
    check_attention(call, heads=1, kv_heads=1, dim=32, num_slots=length + 4, rows=3, dtype=dtype)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[ExtentCall, int, int]:
    """A call, its slots and the batch's rows: ranges with gaps between them, each seen by any rows in any order."""
    rows = draw(st.integers(1, 12))
    few = ExtentBuilder()
    at = 0
    for _ in range(draw(st.integers(1, 6))):
        at += draw(st.integers(0, 3))
        length = draw(st.sampled_from([1, 2, 15, 63, 64, 66, 128, 256, 260, 530]))
        seen_by = draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=rows, unique=True))
        few.add(at, length, seen_by)
        at += length
    if rows > 1 and draw(st.booleans()):
        first = draw(st.integers(0, rows - 2))
        count = draw(st.integers(2, rows - first))
        few.add(at, count, range(first, first + count), causal=True)
        at += count
    call = few.call()
    return call, at, rows


@given(layouts(), st.sampled_from([(1, 1), (3, 3), (6, 2), (8, 1)]), st.sampled_from(DTYPES), st.sampled_from(KV_KINDS))
@settings(max_examples=90, deadline=None, derandomize=True)
def test_attention_of_any_layout(
    layout: tuple[ExtentCall, int, int], heads: tuple[int, int], dtype: torch.dtype, kind: KVKind | None
) -> None:
    call, num_slots, rows = layout
    sizes = {"heads": heads[0], "kv_heads": heads[1], "dim": 32, "num_slots": num_slots, "rows": rows}
    check_attention(call, **sizes, dtype=dtype, kind=kind)


@pytest.mark.parametrize("size", [0.0, 30.0, 2000.0])
def test_scores_far_apart(size: float) -> None:
    """Equal ones, and such that most weights vanish: one key outweighs all that came before it."""
    few = ExtentBuilder()
    few.add(0, 600, [0, 1])
    few.add(600, 100, [1])
    call = few.call()
    query, values = torch.ones(1, 2, 32), random(1, 700, 32)
    keys = torch.linspace(-1, 1, 700)[:, None].expand(1, 700, 32).contiguous() * size
    found = native().attend(query, LayerKV(keys, values), call, 1 / 32)
    expected = PlainKernels().attend(query.double(), LayerKV(keys.double(), values.double()), call, 1 / 32)
    assert_follows(found, expected, rtol=1e-4, atol=1e-4)


def test_heads_of_other_sizes_have_no_kernel() -> None:
    few = ExtentBuilder()
    few.add(0, 3, [0])
    call = few.call()
    assert not native().supports(48)
    with pytest.raises(RuntimeError, match="heads of 48"):
        native().attend(torch.ones(1, 1, 48), LayerKV(torch.ones(1, 3, 48), torch.ones(1, 3, 48)), call, 1.0)


# ---------------------------------------------------------------------- all of them


def kernel_calls(dtype: torch.dtype) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """Each kernel on enough numbers for two threads; made anew for each call, for some change their input."""
    few = ExtentBuilder()
    few.add(0, 1000, list(range(8)))
    few.add(1000, 8, list(range(8)), causal=True)
    call = few.call()

    def rotate() -> tuple[Tensor, ...]:
        kv = LayerKV(torch.zeros(2, 99, 64, dtype=dtype), torch.zeros(2, 99, 64, dtype=dtype))
        slots = torch.arange(98, 1, -1)
        query = native(dtype).rotate(random(97, 512, dtype=dtype), *positions(97, 64, dtype), kv, slots)
        return query, kv.keys, kv.values

    def add_norm() -> tuple[Tensor, ...]:
        x, update, weight = random(50, 999, dtype=dtype), random(50, 999, seed=1, dtype=dtype), random(999, dtype=dtype)
        return native(dtype).add_norm(x, update, 0.5, weight, 1e-5), x

    def attend() -> tuple[Tensor, ...]:
        keys, values = (random(2, 1008, 64, seed=i, dtype=dtype) for i in (1, 2))
        return (native(dtype).attend(random(4, 8, 64, dtype=dtype), LayerKV(keys, values), call, 0.1),)

    return {
        "rotate": rotate,
        "add_norm": add_norm,
        "gated": lambda: (native(dtype).gated(random(50, 2000, dtype=dtype)),),
        "attend": attend,
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", kernel_calls(torch.float32))
def test_two_threads_give_the_same_numbers(name: str, dtype: torch.dtype, two_threads: None) -> None:
    kernel = kernel_calls(dtype)[name]
    found = kernel()
    torch.set_num_threads(1)
    assert all(map(torch.equal, found, kernel()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_in_its_row_and_harms_nothing(dtype: torch.dtype) -> None:
    x = random(3, 40, dtype=dtype)
    x[1, 5] = float("nan")
    kernels, bad, good = native(dtype), [1], [0, 2]
    normed = kernels.norm(x, torch.ones(40, dtype=dtype), 1e-5)
    summed = kernels.add_norm(torch.ones(3, 40, dtype=dtype), x, 1.0, torch.ones(40, dtype=dtype), 1e-5)
    for found in (normed, summed):
        assert found[bad].isnan().all()
        assert found[good].isfinite().all()
    gated = kernels.gated(x)
    assert gated.isnan().nonzero().tolist() == [[1, 5]]
    few = ExtentBuilder()
    few.add(0, 300, [0, 1])
    few.add(300, 3, [0, 1, 2], causal=True)
    call = few.call()
    for place in range(0, 300, 37):
        keys, values = (random(1, 303, 32, seed=i, dtype=dtype) for i in (1, 2))
        keys[0, place, 3] = float("nan")
        found = kernels.attend(random(2, 3, 32, dtype=dtype), LayerKV(keys, values), call, 1.0)
        assert found[:2].isnan().all()
        assert found[2].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_of_another_type_are_left_to_torch(dtype: torch.dtype) -> None:
    """A library is of one type: a part of a model that is of another does not get into it."""
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    kernels, torchs = native(other), TorchKernels()
    x, weight = random(3, 64, dtype=dtype), random(64, seed=1, dtype=dtype)
    assert torch.equal(kernels.norm(x, weight, 1e-5), torchs.norm(x, weight, 1e-5))
    assert torch.equal(kernels.gated(x), torchs.gated(x))
    added, expected = x.clone(), x.clone()
    found = kernels.add_norm(added, x, 0.5, weight, 1e-5)
    assert torch.equal(found, torchs.add_norm(expected, x, 0.5, weight, 1e-5))
    assert torch.equal(added, expected)
    square = random(64, 64, dtype=dtype)
    product = torchs.product(square, None, None)
    assert isinstance(kernels.product(square, None, None), type(product))
    assert kernels.repacked(product) is product
    keys, call = random(1, 3, 64, dtype=dtype), ExtentBuilder().call()
    with pytest.raises(RuntimeError, match="do not attend in"):
        kernels.attend(keys, LayerKV(keys, keys), call, 1.0)
