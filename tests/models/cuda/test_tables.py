"""The tables of attention: each row sees just what it should, once, in tiles that the programs can read."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from midstream.models.attention import attend
from midstream.models.attention_plan import AttentionPlan, Range, RowSegment
from midstream.models.cuda.tables import KEY_BLOCK, DeviceTables, Tables, Tiling, build_tables
from midstream.models.kernels import TorchKernels
from midstream.models.kv import LayerKV
from tests.models.cuda.plain import a_step, plain_kernels, seen_slots
from tests.models.native import random

TILING = Tiling(group=3, kv_heads=2, blocks=(16, 64, 128), programs=16)


def entries_by_row(tables: Tables) -> dict[int, list[tuple[int, int]]]:
    found: dict[int, list[tuple[int, int]]] = {}
    for row, (first, last) in enumerate(zip(tables.merge_first, tables.merge_first[1:], strict=False)):
        found[row] = [tuple(tables.entries[e].tolist()[1:]) for e in tables.merge_entries[first:last]]
    return found


@pytest.mark.parametrize("window", [None, 1, 50, 128, 10_000])
@pytest.mark.parametrize("programs", [1, 16, 100_000])
def test_each_row_sees_its_slots_once(window: int | None, programs: int) -> None:
    segments, rows = a_step()
    tables = build_tables(segments, rows, dataclasses.replace(TILING, programs=programs), window)
    found = entries_by_row(tables)
    expected = seen_slots(segments, window)
    for row in range(rows):
        assert sorted(slot for low, high in found[row] for slot in range(low, high)) == expected[row]


def test_tiles_hold_all_entries_and_no_more_rows_than_fit() -> None:
    segments, rows = a_step()
    tables = build_tables(segments, rows, TILING, None)
    covered: list[int] = []
    for block, tiles in tables.tiles:
        lengths = (tiles[:, 4] - tiles[:, 2]).tolist()
        assert lengths == sorted(lengths, reverse=True)
        for first, count, low, full, high in tiles.tolist():
            assert 0 < count * TILING.group <= block
            covered.extend(range(first, first + count))
            seen = tables.entries[first : first + count]
            assert (seen[:, 1].min(), seen[:, 2].max()) == (low, high)
            assert (full - low) % KEY_BLOCK == 0
            assert full == low or (seen[:, 1].max() == low and seen[:, 2].min() >= full)
    assert sorted(covered) == list(range(len(tables.entries)))


def test_one_row_over_a_long_range_keeps_the_device_busy() -> None:
    length = 65_536
    segment = RowSegment(0, 1, length - 1, length - 1, (Range(0, length, 0),))
    (block, tiles), *others = build_tables([segment], 1, Tiling(4, 8, (16, 64, 128), 528), None).tiles
    assert not others
    assert block == 16
    assert 0.9 * 528 <= len(tiles) * 8 <= 528
    assert (tiles[:, 3] == tiles[:, 4]).all()  # nothing to compare


def test_rows_that_share_a_prefix_read_it_once() -> None:
    shared = Range(0, 4096, 0)
    segments = [RowSegment(i, 1, 4096, 5000 + i, (shared, Range(5000 + i, 1, 4096))) for i in range(4)]
    tables = build_tables(segments, 4, Tiling(4, 8, (16, 64, 128), 1), None)
    ((_, tiles),) = tables.tiles
    assert [tuple(tile) for tile in tiles[:, 1:].tolist() if tile[3] <= 4096] == [(4, 0, 4096, 4096)]


def test_a_prompts_next_chunk_is_one_range_with_what_is_before_it() -> None:
    segment = RowSegment(0, 32, 64, 64, (Range(0, 64, 0),))
    tables = build_tables([segment], 32, Tiling(1, 1, (16, 64, 128), 1), None)
    assert tables.direct
    assert tables.entries.tolist() == [[i, 0, 65 + i] for i in range(32)]


def test_padding_adds_rows_that_see_nothing_and_tiles_without_an_entry() -> None:
    segments, rows = a_step()
    tables = build_tables(segments, rows, TILING, None)
    more = tuple((block, count + 3) for block, count in tables.shape.tiles)
    shape = tables.shape._replace(rows=64, entries=len(tables.entries) + 5, tiles=(*more, (999, 2)))
    numbers = tables.packed(shape)
    assert len(numbers) == shape.numbers
    padded = DeviceTables.over(torch.from_numpy(numbers), shape, direct=False)
    assert padded.rows == 64
    assert padded.merge_first[rows:].tolist() == [len(tables.entries)] * (64 - rows + 1)
    for (block, tiles), (again, own) in zip(padded.tiles, tables.tiles, strict=False):
        assert block == again
        assert (tiles[: len(own)].numpy() == own).all()
        assert not tiles[len(own) :].any()
    assert padded.tiles[-1][1].tolist() == [[0] * 5] * 2
    query = random(6, 64, 32)
    keys, values = random(2, 1000, 32, seed=1), random(2, 1000, 32, seed=2)
    programs = plain_kernels()._programs
    out = programs.attend(query, keys, values, padded, 0.2)
    alone = programs.attend(query[:, :rows], keys, values, DeviceTables.of(tables, torch.device("cpu")), 0.2)
    assert torch.equal(out[:rows], alone)
    assert not out[rows:].any()


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("heads", [(6, 2), (4, 4), (8, 1)])
def test_attention_by_tables_is_attention_by_calls(heads: tuple[int, int], window: int | None) -> None:
    segments, rows = a_step()
    query = random(heads[0], rows, 32)
    keys, values = random(heads[1], 1000, 32, seed=1), random(heads[1], 1000, 32, seed=2)
    plan = AttentionPlan(segments, torch.float32, torch.device("cpu"), rows)
    expected = attend(query, LayerKV(keys, values), plan, TorchKernels(), 0.2, window)
    found = attend(query, LayerKV(keys, values), plan, plain_kernels(), 0.2, window)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_heads_that_no_tile_holds_are_left_to_the_plans_calls() -> None:
    kernels = plain_kernels()
    assert kernels.tiling(256, 1, 64, torch.bfloat16) is None
    assert kernels.tiling(64, 1, 64, torch.bfloat16) is not None
    assert kernels.tiling(8, 8, 512, torch.bfloat16) is None
    assert kernels.tiling(8, 8, 64, torch.float64) is None
    numbers = random(4, 3, 512)
    plan = AttentionPlan((RowSegment(0, 3, 0, 0, ()),), torch.float32, torch.device("cpu"), 3)
    assert kernels.attend_step(numbers, LayerKV(numbers, numbers), plan, 0.1, None) is None
    found = attend(numbers, LayerKV(numbers, numbers), plan, kernels, 0.1, None)
    torch.testing.assert_close(found, attend(numbers, LayerKV(numbers, numbers), plan, TorchKernels(), 0.1, None))


def test_an_empty_window_leaves_no_entry() -> None:
    tables = build_tables([RowSegment(0, 1, 300, 300, (Range(0, 200, 0), Range(200, 101, 200)))], 1, TILING, 20)
    assert np.array_equal(tables.entries, [[0, 281, 301]])
