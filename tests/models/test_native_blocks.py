"""The compiled attention of blocks of rows, of which each sees spans of the pool up to its own position."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from midstream.models.attention import attend
from midstream.models.attention_plan import AttentionPlan, Range, RowSegment
from midstream.models.extents import ExtentBuilder, ExtentCall, Span
from midstream.models.kv import KVKind, LayerKV
from midstream.models.native import build
from midstream.models.native.kernels import _NUMBERS, HEAD_DIMS, NativeKernels
from tests.models.native import (
    DTYPES,
    KV_KINDS,
    assert_attends,
    held,
    native,
    needs_compiler,
    random,
    rows_in,
    seen_by,
)

pytestmark = [needs_compiler, pytest.mark.usefixtures("no_gradients")]
CPU = torch.device("cpu")
LENGTHS = (1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 257, 600)


@pytest.fixture
def no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def check(
    call: ExtentCall,
    *,
    heads: int,
    kv_heads: int,
    dim: int,
    dtype: torch.dtype,
    rows: int,
    kernels: NativeKernels | None = None,
    kind: KVKind | None = None,
) -> None:
    """Slots that nobody sees hold NaN: it shows where one is read.

    Before a window less than 128 keys may be: keys are taken together no matter where a window begins.
    """
    wider = replace(call, window=None if call.window is None else call.window + 127)
    seen = sorted({slot for row in rows_in(call) for slot in seen_by(wider, row)})
    query = random(heads, rows, dim, dtype=dtype)
    keys, values = torch.full((2, kv_heads, seen[-1] + 3, dim), float("nan"), dtype=dtype)
    for tensor, seed in ((keys, 1), (values, 2)):
        tensor[:, seen] = random(kv_heads, len(seen), dim, seed=seed, dtype=dtype)
    kv = held(keys, values, kind)
    found = (kernels or native(dtype)).attend(query, kv, call, dim**-0.5)
    assert found.dtype == dtype
    assert_attends(found, query, kv, call, dim**-0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KV_KINDS)
@pytest.mark.parametrize("dim", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("group", range(1, 10))
def test_all_head_sizes_and_groups(group: int, dim: int, kind: KVKind | None, dtype: torch.dtype) -> None:
    builder = ExtentBuilder()
    builder.add_block(0, 70, 130, [Span(400, 97, 0), Span(3, 33, 97), Span(50, 70, 130)])
    builder.add_block(71, 5, 40, [Span(400, 40, 0), Span(200, 5, 40)])
    builder.add_block(76, 1, 0, [Span(300, 1, 0)])
    builder.add(60, 20, [70])
    check(builder.call(), heads=2 * group, kv_heads=2, dim=dim, dtype=dtype, rows=77, kind=kind)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("rows", [1, 3, 12, 13, 31, 64, 65, 193])
def test_ragged_lengths(rows: int, length: int, dtype: torch.dtype) -> None:
    """In eight bits as well."""
    builder = ExtentBuilder()
    builder.add_block(0, rows, length, [Span(2, length, 0), Span(700, rows, length)])
    for kind in KV_KINDS:
        check(builder.call(), heads=3, kv_heads=1, dim=32, dtype=dtype, rows=rows, kind=kind)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", LENGTHS)
def test_rows_that_see_but_themselves(rows: int, dtype: torch.dtype) -> None:
    builder = ExtentBuilder()
    builder.add_block(0, rows, 0, [Span(0, rows, 0)])
    check(builder.call(), heads=2, kv_heads=2, dim=64, dtype=dtype, rows=rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KV_KINDS)
@pytest.mark.parametrize("dim", [32, 256])
@pytest.mark.parametrize("window", [1, 2, 17, 64, 128, 129, 300, 800])
def test_windows(window: int, dim: int, kind: KVKind | None, dtype: torch.dtype) -> None:
    builder = ExtentBuilder(window)
    builder.add_block(0, 150, 600, [Span(0, 301, 0), Span(400, 299, 301), Span(800, 150, 600)])
    check(builder.call(), heads=3, kv_heads=1, dim=dim, dtype=dtype, rows=150, kind=kind)


Narrow = Callable[[torch.dtype], NativeKernels]


@pytest.fixture(scope="module", params=["-march=x86-64", "-march=x86-64-v3"])
def narrow(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Narrow:
    """The kernels as they are compiled for a processor without AVX-512, or without AVX, by type."""
    if platform.machine() != "x86_64":
        pytest.skip("needs a processor of that family")
    if request.param.endswith("v3") and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("needs AVX2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIDSTREAM_CACHE", str(tmp_path_factory.mktemp("narrow")))
        patch.setattr(build, "_NATIVE", (request.param,))
        patch.setattr(build, "_FLAGS", ("-O1", *build._FLAGS[1:]))  # compiled in half of the time
        libraries = {dtype: build.compiled(_NUMBERS[dtype], HEAD_DIMS) for dtype in DTYPES}

    def of(dtype: torch.dtype) -> NativeKernels:
        library = libraries[dtype]
        assert library is not None
        return NativeKernels(library, dtype, HEAD_DIMS)

    return of


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [32, 64, 96, 128, 256])
def test_on_processors_with_narrower_registers(narrow: Narrow, dim: int, dtype: torch.dtype) -> None:
    for group in range(1, 6):
        builder = ExtentBuilder()
        builder.add_block(0, 50, 130, [Span(400, 97, 0), Span(3, 33, 97), Span(50, 50, 130)])
        builder.add(400, 97, range(50, 57))
        builder.add(200, 5, range(50, 55), causal=True)
        builder.add(600, 70, [57])
        for kind in KV_KINDS:
            sizes = {"heads": 2 * group, "kv_heads": 2, "dim": dim, "rows": 58}
            check(builder.call(), **sizes, dtype=dtype, kernels=narrow(dtype), kind=kind)


# ---------------------------------------------------------------------- what a row's result depends on


def attended(segments: Sequence[RowSegment], query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    plan = AttentionPlan(tuple(segments), query.dtype, CPU, query.shape[1], extents=True)
    return attend(query, LayerKV(keys, values), plan, native(query.dtype), 0.2, None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_block_gives_the_same_whatever_else_is_in_the_step(dtype: torch.dtype) -> None:
    prefix = Range(10, 300, 0)
    segments = [
        RowSegment(0, 100, 300, 400, (prefix,)),
        RowSegment(100, 1, 305, 505, (prefix, Range(500, 6, 300))),
        RowSegment(101, 40, 310, 610, (prefix, Range(600, 10, 300))),
        RowSegment(141, 8, 300, 700, (prefix,)),
    ]
    query = random(4, 149, 64, dtype=dtype)
    keys, values = (random(2, 710, 64, seed=i, dtype=dtype) for i in (1, 2))
    together = attended(segments, query, keys, values)
    for segment in segments[0], segments[2]:
        rows = slice(segment.row, segment.row + segment.count)
        assert torch.equal(attended([replace(segment, row=0)], query[:, rows], keys, values), together[rows])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(64, 64, 64, 108), (33, 267), (150, 150), (40,) * 7 + (20,)])
def test_a_text_read_in_pieces_gives_what_it_gives_whole(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    """The same bits, where a piece is long enough for blocks; else but for the rounding of another path."""
    prefix = Range(400, 77, 0)
    query = random(6, 300, 64, dtype=dtype)
    keys, values = (random(2, 500, 64, seed=i, dtype=dtype) for i in (1, 2))
    whole = attended([RowSegment(0, 300, 77, 0, (prefix,))], query, keys, values)
    at = 0
    for size in sizes:
        seen = (prefix, Range(0, at, 77)) if at else (prefix,)
        found = attended([RowSegment(0, size, 77 + at, at, seen)], query[:, at : at + size], keys, values)
        if size > 32:
            assert torch.equal(found, whole[at : at + size])
        else:
            difference = (found - whole[at : at + size]).abs().max()
            assert difference < (2e-6 if dtype == torch.float32 else 0.02)
        at += size


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_threads_gives_the_same_numbers(dtype: torch.dtype) -> None:
    builder = ExtentBuilder()
    builder.add_block(0, 200, 0, [Span(0, 200, 0)])
    call = builder.call()
    query, keys, values = (random(2, 200, 64, seed=i, dtype=dtype) for i in range(3))
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(native(dtype).attend(query, LayerKV(keys, values), call, 0.2))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


# ---------------------------------------------------------------------- numbers far from the usual


@pytest.mark.parametrize("size", [0.0, 30.0, 2000.0, -2000.0])
def test_scores_far_apart(size: float) -> None:
    """Equal ones, and such that most weights vanish: one key outweighs all before it, or all after it."""
    builder = ExtentBuilder()
    builder.add_block(0, 100, 600, [Span(0, 700, 0)])
    call = builder.call()
    query, values = torch.ones(1, 100, 32), random(1, 700, 32)
    keys = torch.linspace(-1, 1, 700)[:, None].expand(1, 700, 32).contiguous() * size
    found = native().attend(query, LayerKV(keys, values), call, 1 / 32)
    scores = (query.double() @ keys.double().transpose(1, 2) / 32)[0]
    hidden = torch.ones(100, 700, dtype=torch.bool).triu(601)
    expected = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ values[0].double()
    torch.testing.assert_close(found[:, 0].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KV_KINDS)
@pytest.mark.parametrize("place", [0, 40, 127, 128, 290, 310, 399])
def test_a_nan_harms_the_rows_that_see_it(place: int, kind: KVKind | None, dtype: torch.dtype) -> None:
    builder = ExtentBuilder()
    builder.add_block(0, 100, 300, [Span(0, 400, 0)])
    keys, values = (random(1, 400, 32, seed=i, dtype=dtype) for i in (1, 2))
    keys[0, place, 3] = float("nan")
    found = native(dtype).attend(random(2, 100, 32, dtype=dtype), held(keys, values, kind), builder.call(), 1.0)
    seeing = max(0, place - 300)
    assert found[seeing:].isnan().all()
    assert found[:seeing].isfinite().all()
