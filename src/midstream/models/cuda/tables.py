"""Which slots of the pool each row of a step sees, as tables of numbers for kernels that read them where they lie.

A row sees ranges of the pool in full and its own segment causally. Each range, with the rows that see it, is cut into
*tiles*: some of its rows times some of its keys, the work of one program for one KV head. A row of a tile is an
*entry*: it has a partial result, and a row's entries are merged by their log-sum-exp. Rows that share a prefix stand in
the same tiles, so its keys are read once for all of them; a long range is cut along its keys, so that one row alone
keeps the device busy. Prefill and decode, causal parts and sliding windows differ in nothing but the numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from midstream.models.attention_plan import Range, RowSegment, joined_ranges

Numbers = NDArray[np.int64]

TILE_FIELDS = 5
ENTRY_FIELDS = 3
# A multiple of every number of keys that a program reads at a time: only then can it leave out all comparisons.
KEY_BLOCK = 128


class View(NamedTuple):
    """Row `row` of the batch sees slots `low` … `high`."""

    row: int
    low: int
    high: int


@dataclass(frozen=True, slots=True)
class Tiling:
    """What tiles are cut for: `group` query heads share a KV head, and some `programs` keep the device busy.

    `blocks`: query vectors that a tile may have, ascending; each has a kernel of its own.
    """

    group: int
    kv_heads: int
    blocks: tuple[int, ...]
    programs: int

    def block_for(self, rows: int) -> int:
        """The smallest block that holds so many rows' query vectors, else the largest."""
        return next((block for block in self.blocks if block >= rows * self.group), self.blocks[-1])

    def rows_of(self, block: int) -> int:
        """Rows of a tile of this block."""
        return block // self.group


class TablesShape(NamedTuple):
    """How large tables are: rows of the batch, entries, and the number of tiles of each block."""

    rows: int
    entries: int
    tiles: tuple[tuple[int, int], ...]

    @property
    def numbers(self) -> int:
        tiles = sum(count for _, count in self.tiles)
        return tiles * TILE_FIELDS + self.entries * (ENTRY_FIELDS + 1) + self.rows + 1


@dataclass(frozen=True, slots=True)
class Tables:
    """Tables on the host.

    `tiles` by block [n, 5]: first entry, number of entries, and slots `low`, `full`, `high`: all of its rows see `low`
    … `full` (a multiple of KEY_BLOCK), some of them see slots up to `high`. `entries` [n, 3]: row of the batch, first
    slot that it sees in this tile, the one behind its last. Row r merges the entries
    `merge_entries[merge_first[r] : merge_first[r + 1]]`.
    """

    tiles: tuple[tuple[int, Numbers], ...]
    entries: Numbers
    merge_first: Numbers
    merge_entries: Numbers

    @property
    def shape(self) -> TablesShape:
        return TablesShape(
            len(self.merge_first) - 1, len(self.entries), tuple((block, len(tiles)) for block, tiles in self.tiles)
        )

    @property
    def direct(self) -> bool:
        """Whether each row has exactly one entry, so that nothing is to be merged."""
        return bool((np.diff(self.merge_first) == 1).all())

    def packed(self, shape: TablesShape) -> Numbers:
        """All numbers in one array, padded to `shape`: tiles of no entry, rows that see nothing."""
        found = dict(self.tiles)
        none = np.zeros((0, TILE_FIELDS), np.int64)
        more_rows = shape.rows + 1 - len(self.merge_first)
        return np.concatenate(
            [
                *(_padded(found.get(block, none), count) for block, count in shape.tiles),
                _padded(self.entries, shape.entries),
                np.pad(self.merge_first, (0, more_rows), mode="edge"),
                _padded(self.merge_entries[:, None], shape.entries),
            ]
        )


@dataclass(frozen=True, slots=True)
class DeviceTables:
    """Tables where the kernels read them."""

    tiles: tuple[tuple[int, Tensor], ...]
    entries: Tensor
    merge_first: Tensor
    merge_entries: Tensor
    direct: bool

    @property
    def rows(self) -> int:
        return len(self.merge_first) - 1

    @classmethod
    def over(cls, numbers: Tensor, shape: TablesShape, *, direct: bool) -> DeviceTables:
        """Views of `numbers`, which holds what `Tables.packed` gave for this shape."""
        sizes = [count * TILE_FIELDS for _, count in shape.tiles]
        *tiles, entries, first, merged = numbers.split(
            [*sizes, shape.entries * ENTRY_FIELDS, shape.rows + 1, shape.entries]
        )
        return cls(
            tuple((block, part.view(-1, TILE_FIELDS)) for (block, _), part in zip(shape.tiles, tiles, strict=True)),
            entries.view(-1, ENTRY_FIELDS),
            first,
            merged,
            direct,
        )

    @classmethod
    def of(cls, tables: Tables, device: torch.device) -> DeviceTables:
        """`tables` as they are, in one copy."""
        numbers = torch.from_numpy(tables.packed(tables.shape)).to(device)
        return cls.over(numbers, tables.shape, direct=tables.direct)


def build_tables(segments: Sequence[RowSegment], num_rows: int, tiling: Tiling, window: int | None) -> Tables:
    """The tables of a step of `num_rows` rows, for layers that see the last `window` positions (None: all)."""
    seen = [views for views in _seen(segments, window) if views]
    size = _keys_of_tiles(seen, tiling)
    tiles: dict[int, list[tuple[int, ...]]] = {}
    entries: list[View] = []
    for views in seen:
        block = tiling.block_for(len(views))
        rows = tiling.rows_of(block)
        for part in _cut(views, size):
            for at in range(0, len(part), rows):
                tile = part[at : at + rows]
                tiles.setdefault(block, []).append((len(entries), len(tile), *_bounds(tile)))
                entries.extend(tile)
    for found in tiles.values():
        found.sort(key=lambda tile: tile[2] - tile[4])  # the longest first, so that none is left over at the end
    table = np.array(entries, np.int64).reshape(-1, ENTRY_FIELDS)
    order = np.argsort(table[:, 0], kind="stable")
    return Tables(
        tuple((block, np.array(tiles[block], np.int64)) for block in sorted(tiles)),
        table,
        np.searchsorted(table[order, 0], np.arange(num_rows + 1)),
        order,
    )


def _seen(segments: Sequence[RowSegment], window: int | None) -> list[list[View]]:
    """For each range, and each segment's own part: the rows that see some of it, and what they see."""
    before: dict[int, Range] = {}
    found: list[list[View]] = []
    for r, users in joined_ranges(segments):
        if len(users) == 1 and _leads_to(r, users[0]):
            before[users[0].row] = r
        else:
            found.append([view for s in users for view in _views(s, r, window)])
    for s in segments:
        if s.count > 1:
            own = Range(s.slot, s.count, s.position)
            if s.row in before:
                start, length, position = before[s.row]
                own = Range(start, length + s.count, position)
            found.append(_views(s, own, window))
    return found


def _leads_to(r: Range, s: RowSegment) -> bool:
    """Whether a range ends where a segment of several rows begins, so that the two are one."""
    return s.count > 1 and r.start + r.length == s.slot and r.position + r.length == s.position


def _views(s: RowSegment, r: Range, window: int | None) -> list[View]:
    """What each row of a segment sees of a range: nothing behind its own position, nothing before its window."""
    views: list[View] = []
    for i in range(s.count):
        position = s.position + i
        first = 0 if window is None else max(0, position - window + 1 - r.position)
        end = min(r.length, position + 1 - r.position)
        if first < end:
            views.append(View(s.row + i, r.start + first, r.start + end))
    return views


def _keys_of_tiles(seen: Sequence[Sequence[View]], tiling: Tiling) -> int:
    """How many keys a tile has, so that the step's tiles are as many programs as keep the device busy."""
    work = 0
    for views in seen:
        rows = tiling.rows_of(tiling.block_for(len(views)))
        length = max(view.high for view in views) - min(view.low for view in views)
        work += -(-len(views) // rows) * length
    keys = -(-work * tiling.kv_heads // tiling.programs)
    return max(KEY_BLOCK, -(-keys // KEY_BLOCK) * KEY_BLOCK)


def _cut(views: Sequence[View], size: int) -> list[list[View]]:
    """The same in pieces of `size` slots, each with the rows that see some of it."""
    low, high = min(view.low for view in views), max(view.high for view in views)
    return [
        [View(row, max(a, at), min(b, at + size)) for row, a, b in views if a < at + size and b > at]
        for at in range(low, high, size)
    ]


def _bounds(tile: Sequence[View]) -> tuple[int, int, int]:
    """`low`, `full` and `high` of a tile."""
    low, high = min(view.low for view in tile), max(view.high for view in tile)
    common = min(view.high for view in tile) - low if max(view.low for view in tile) == low else 0
    return low, low + common // KEY_BLOCK * KEY_BLOCK, high


def _padded(numbers: Numbers, count: int) -> Numbers:
    """[n, fields] → [count · fields], zeros below."""
    return np.pad(numbers, ((0, count - len(numbers)), (0, 0))).ravel()
