"""Plans with extent calls give what plans without them give, and what plain causal attention gives."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from midstream.models.attention import attend
from midstream.models.attention_plan import AttentionPlan, Range, RowSegment, rows_of
from midstream.models.extents import ExtentBuilder, ExtentCall, Span
from midstream.models.kernels import Kernels, TorchKernels
from midstream.models.kv import LayerKV
from tests.models.native import PlainKernels, native, needs_compiler, numbers, random, rows_in, seen_by

CPU = torch.device("cpu")
DIM = 32
HEADS = ((1, 1), (4, 2), (3, 1))
KERNELS = [pytest.param("plain", id="by definition"), pytest.param("native", id="compiled", marks=needs_compiler)]


class Scene(NamedTuple):
    """The segments of a step over a pool of `num_slots` slots."""

    segments: tuple[RowSegment, ...]
    num_slots: int

    @property
    def num_rows(self) -> int:
        return sum(s.count for s in self.segments)


class Node(NamedTuple):
    """A piece of a sequence, as the engine keeps it: consecutive slots, and the pieces before it."""

    whole: Range
    before: tuple[Range, ...]


@st.composite
def scenes(draw: st.DrawFn) -> Scene:
    """Trees of shared pieces; at some of their ends a segment of a new branch, some of whose KV is there already."""
    inner = draw(st.lists(st.tuples(st.integers(-1, 4), st.sampled_from([1, 2, 5, 31, 32, 33, 70, 257])), max_size=5))
    segment = st.tuples(
        st.integers(-1, 4), st.sampled_from([0, 0, 1, 5, 31, 40]), st.sampled_from([1, 1, 1, 2, 5, 31, 32, 33, 40, 140])
    )
    tips = draw(st.lists(segment, min_size=1, max_size=8))
    lengths = [length for _, length in inner] + [offset + count for _, offset, count in tips]
    starts, at = [0] * len(lengths), 0
    for i in draw(st.permutations(range(len(lengths)))):
        at += draw(st.sampled_from([0, 0, 0, 1, 3]))
        starts[i], at = at, at + lengths[i]
    nodes: list[Node] = []
    for i, (parent, length) in enumerate(inner):
        before, position = _ancestry(nodes, parent)
        nodes.append(Node(Range(starts[i], length, position), before))
    segments, row = [], 0
    for i, (parent, offset, count) in enumerate(tips, start=len(inner)):
        before, position = _ancestry(nodes, parent)
        # A single row sees its own slot in the range before it.
        own = offset + (count == 1)
        seen = (*before, Range(starts[i], own, position)) if own else before
        segments.append(RowSegment(row, count, position + offset, starts[i] + offset, seen))
        row += count
    return Scene(tuple(segments), at)


def _ancestry(nodes: list[Node], parent: int) -> tuple[tuple[Range, ...], int]:
    """What lies before a child of that node, and the child's position; -1 or a node that is not there: nothing."""
    if not 0 <= parent < len(nodes):
        return (), 0
    node = nodes[parent]
    return (*node.before, node.whole), node.whole.position + node.whole.length


def dense(query: Tensor, keys: Tensor, values: Tensor, scene: Scene, scale: float, window: int | None) -> Tensor:
    """Each row by itself, over the slots of all positions up to its own, in float64."""
    group = query.shape[0] // keys.shape[0]
    out = []
    for s in scene.segments:
        ranges = [*s.seen, Range(s.slot, s.count, s.position)]
        place = {r.position + i: r.start + i for r in ranges for i in range(r.length)}
        for i in range(s.count):
            last = s.position + i
            first = 0 if window is None else max(0, last - window + 1)
            slots = [place[position] for position in range(first, last + 1)]
            k, v = (tensor[:, slots].double().repeat_interleave(group, 0) for tensor in (keys, values))
            scores = (k @ query[:, s.row + i].double().unsqueeze(-1)).squeeze(-1) * scale
            out.append((scores.softmax(-1).unsqueeze(1) @ v).squeeze(1))
    return torch.stack(out)


def kernels_named(name: str) -> Kernels:
    return native() if name == "native" else PlainKernels()


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("window", [None, 7, 40])
@given(scene=scenes(), heads=st.sampled_from(HEADS))
@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_any_tree_of_segments(name: str, window: int | None, scene: Scene, heads: tuple[int, int]) -> None:
    query = random(heads[0], scene.num_rows, DIM)
    # No slot but those that hold something may be read.
    keys, values = torch.full((2, heads[1], scene.num_slots, DIM), float("nan"))
    for s in scene.segments:
        for r in (*s.seen, Range(s.slot, s.count, s.position)):
            for tensor, seed in ((keys, 1), (values, 2)):
                tensor[:, r.start : r.start + r.length] = random(heads[1], r.length, DIM, seed=seed + 7 * r.start)
    one = AttentionPlan(scene.segments, torch.float32, CPU, scene.num_rows, extents=True)
    none = AttentionPlan(scene.segments, torch.float32, CPU, scene.num_rows)
    expected = dense(query, keys, values, scene, 0.2, window)
    found = attend(query, LayerKV(keys, values), one, kernels_named(name), 0.2, window)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    by_torch = attend(query, LayerKV(keys, values), none, TorchKernels(), 0.2, window)
    torch.testing.assert_close(found, by_torch, rtol=1e-5, atol=1e-5)
    call = one.extent_call(window)
    assert rows_in(call) == list(range(scene.num_rows))
    check_merges(call)


def check_merges(call: ExtentCall) -> None:
    """Every partial result is merged once, into the row that it is of."""
    assert sorted(call.merge_partial.tolist()) == list(range(call.num_partials))
    of_row: dict[int, int] = {}
    for _, length, first, count, _, partial in call.chunks.tolist():
        assert length > 0
        of_row |= {partial + i: int(call.chunk_rows[first + i]) for i in range(count)}
    for place, row in enumerate(call.merge_rows.tolist()):
        merged = call.merge_partial[call.merge_first[place] : call.merge_first[place + 1]].tolist()
        assert merged
        assert all(of_row[partial] == row for partial in merged)


def test_branches_that_decode_read_their_shared_prefix_once_and_all_in_one_call() -> None:
    prefix = Range(100, 300, 0)
    segments = tuple(RowSegment(i, 1, 305, 10 * i + 5, (prefix, Range(10 * i, 6, 300))) for i in range(4))
    call = AttentionPlan(segments, torch.float32, CPU, 4, extents=True).extent_call(None)
    readers = [(start, length, count) for start, length, _, count, _, _ in call.chunks.tolist()]
    assert sorted(readers) == [*((10 * i, 6, 1) for i in range(4)), (100, 256, 4), (356, 44, 4)]
    assert rows_in(call) == list(range(4))


def test_a_row_is_served_by_chunks_or_by_a_block() -> None:
    prefix = Range(0, 50, 0)
    decoding = [RowSegment(i, 1, 50, 100 + i, (prefix, Range(100 + i, 1, 50))) for i in range(3)]
    asking = RowSegment(3, 5, 50, 110, (prefix,))
    reading = RowSegment(8, 40, 60, 200, (prefix, Range(190, 10, 50)))
    call = AttentionPlan((*decoding, asking, reading), torch.float32, CPU, 48, extents=True).extent_call(None)
    assert call.merge_rows.tolist() == list(range(8))
    chunks = [(start, length, count, causal) for start, length, _, count, causal, _ in call.chunks.tolist()]
    assert sorted(chunks) == [(0, 50, 8, 0), *((100 + i, 1, 1, 0) for i in range(3)), (110, 5, 5, 1)]
    # What a segment has of its own already is one with what it gets: no matter in how many steps it was read.
    assert call.blocks.tolist() == [[8, 40, 60, 0, 2]]
    assert call.spans.tolist() == [[0, 50, 0], [190, 50, 50]]


def test_blocks_are_cut_and_those_that_see_most_come_first() -> None:
    builder = ExtentBuilder()
    builder.add_block(0, 10, 100, [Span(0, 110, 0)])
    builder.add_block(10, 3, 200, [Span(300, 50, 0), Span(110, 153, 50)])
    call = builder.call()
    assert call.num_block_rows == 13
    assert call.cut(4).tolist() == [[10, 3, 200, 1, 2], [8, 2, 108, 0, 1], [4, 4, 104, 0, 1], [0, 4, 100, 0, 1]]
    assert call.cut(16).tolist() == [[10, 3, 200, 1, 2], [0, 10, 100, 0, 1]]


def test_a_row_behind_a_window_sees_the_window_alone() -> None:
    seen = (Range(0, 50, 0), Range(80, 11, 50))
    plan = AttentionPlan((RowSegment(0, 1, 60, 90, seen),), torch.float32, CPU, 1, extents=True)
    assert seen_by(plan.extent_call(16), 0) == [*range(45, 50), *range(80, 91)]
    assert seen_by(plan.extent_call(61), 0) == seen_by(plan.extent_call(None), 0) == [*range(50), *range(80, 91)]


def test_long_ranges_are_cut_into_at_most_64_chunks_and_causal_ones_not_at_all() -> None:
    for length, chunks in ((1, 1), (256, 1), (257, 2), (64 * 256, 64), (64 * 256 + 1, 64), (100_000, 64)):
        few = ExtentBuilder()
        few.add(7, length, [3, 1])
        few.add(200_000, 3, [0, 1, 2], causal=True)
        call = few.call()
        assert len(call.chunks) == chunks + 1
        assert seen_by(call, 3) == list(range(7, 7 + length))
        assert [seen_by(call, row)[-3:] for row in (0, 2)] == [[200_000], [200_000, 200_001, 200_002]]
        assert seen_by(call, 1) == [*range(7, 7 + length), 200_000, 200_001]
        check_merges(call)


def test_a_range_that_many_rows_see_is_cut_into_longer_chunks() -> None:
    for rows, lengths in ((7, [256, 256, 88]), (8, [512, 88])):
        builder = ExtentBuilder()
        builder.add(0, 600, range(rows))
        assert builder.call().chunks[:, 1].tolist() == lengths


def test_nothing_added_is_nobodys_row() -> None:
    few = ExtentBuilder()
    assert rows_in(few.call()) == []
    few.add(5, 0, [0])
    assert rows_in(few.call()) == []
    few.add(5, 2, [4])
    assert rows_in(few.call()) == [4]


def test_rows_in_a_row_are_a_slice() -> None:
    assert rows_of([4, 5, 6], CPU) == (slice(4, 7), 3)
    scattered = rows_of([1, 4], CPU)
    assert isinstance(scattered.selector, Tensor)
    assert numbers(scattered) == [1, 4]
