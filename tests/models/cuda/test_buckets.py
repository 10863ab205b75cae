"""What steps are padded to."""

from __future__ import annotations

import pytest

from midstream.models.attention_plan import Range, RowSegment
from midstream.models.cuda.buckets import Bucket, rows_bucket, step_bucket
from midstream.models.cuda.tables import Tables, Tiling, build_tables

TILING = Tiling(group=4, kv_heads=8, blocks=(16, 64, 128), programs=528)


def decode(rows: int, context: int) -> Tables:
    segments = [
        RowSegment(i, 1, context - 1, (i + 1) * 100_000 + context - 1, (Range((i + 1) * 100_000, context, 0),))
        for i in range(rows)
    ]
    return build_tables(segments, rows, TILING, None)


def bucket_of(rows: int, context: int, rank_block: int = 0) -> Bucket | None:
    return step_bucket([(decode(rows, context), TILING)], rows, rank_block)


@pytest.mark.parametrize(("rows", "bucket"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (9, 16), (33, 64), (64, 64)])
def test_rows_are_padded_to_a_power_of_two(rows: int, bucket: int) -> None:
    assert rows_bucket(rows) == bucket
    found = bucket_of(rows, 200)
    assert found is not None
    assert found.rows == found.tables[0].rows == bucket


def test_a_long_answer_stays_in_one_bucket() -> None:
    assert len({bucket_of(1, context) for context in range(1025, 1025 + 512)}) == 1


def test_all_contexts_together_have_few_buckets() -> None:
    assert len({bucket_of(1, context) for context in range(1, 65_536, 97)}) <= 2


def test_the_tables_of_a_step_fit_its_bucket() -> None:
    for rows, context in ((1, 10), (3, 5000), (64, 700), (17, 65_000)):
        tables, bucket = decode(rows, context), bucket_of(rows, context)
        assert bucket is not None
        (shape,) = bucket.tables
        assert shape.entries >= len(tables.entries)
        assert [block for block, _ in shape.tiles] == [block for block, _ in tables.tiles]
        assert all(room >= len(tiles) for (_, room), (_, tiles) in zip(shape.tiles, tables.tiles, strict=True))
        assert len(tables.packed(shape)) == shape.numbers


def test_adapters_and_their_ranks_have_buckets_of_their_own() -> None:
    assert len({bucket_of(1, 100, rank) for rank in (0, 16, 32)}) == 3


def test_prefill_and_steps_of_too_many_tiles_are_in_none() -> None:
    assert bucket_of(65, 10) is None
    crowded = Tiling(group=4, kv_heads=8, blocks=(16, 64, 128), programs=10**9)
    segment = RowSegment(0, 1, 299_999, 299_999, (Range(0, 300_000, 0),))
    assert step_bucket([(build_tables([segment], 1, crowded, None), crowded)], 1, 0) is None
