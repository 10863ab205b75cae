"""The sizes that steps are padded to, so that a few recorded forwards serve them all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from midstream.models.cuda.tables import Tables, TablesShape, Tiling

# Rows of the largest step that is recorded: a step of more is a prefill, which keeps the device busy by itself.
MOST_ROWS = 64
_LEAST_TILES = 32
_TILES_GROWTH = 4
_MOST_TILES = 2048


class Bucket(NamedTuple):
    """What a recorded forward was recorded for: rows, the tables of each kind of layer, adapters' ranks (0: none)."""

    rows: int
    tables: tuple[TablesShape, ...]
    rank_block: int


def rows_bucket(rows: int) -> int:
    """The next power of two."""
    return 1 << (rows - 1).bit_length()


def tables_bucket(tables: Tables, rows: int, tiling: Tiling) -> TablesShape | None:
    """The shape that tables of a step are padded to; None where they are too large.

    Tiles of no entry cost next to nothing, so there are few sizes; entries are as many as the tiles can hold.
    """
    tiles = tuple((block, _tiles_bucket(count)) for block, count in tables.shape.tiles)
    if any(count > _MOST_TILES for _, count in tiles):
        return None
    return TablesShape(rows, sum(count * tiling.rows_of(block) for block, count in tiles), tiles)


def step_bucket(found: Sequence[tuple[Tables, Tiling]], rows: int, rank_block: int) -> Bucket | None:
    """The bucket of a step with these tables; None where it is not to be recorded."""
    if rows > MOST_ROWS:
        return None
    shapes = [tables_bucket(tables, rows_bucket(rows), tiling) for tables, tiling in found]
    fitting = tuple(shape for shape in shapes if shape is not None)
    return Bucket(rows_bucket(rows), fitting, rank_block) if len(fitting) == len(shapes) else None


def _tiles_bucket(count: int) -> int:
    size = _LEAST_TILES
    while size < count:
        size *= _TILES_GROWTH
    return size
