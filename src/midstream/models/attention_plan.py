"""How the rows of one forward attend to the KV pool, worked out once per step and shared by all layers.

A row sees a set of pool ranges in full, and its own segment causally. Ranges are cut so that each is seen whole by
some set of segments; ranges that touch and are seen by the same segments are joined.

Where there is a kernel that reads ranges where they lie, all rows are served by one *extent* call: rows of short
segments by the ranges that they share, rows of long ones by blocks. Torch's own attention gets several calls, whose
results are merged by their log-sum-exp:

- a long range is one *dense* call for all rows that see it: rows that share a prefix read it once (cascade attention);
- the causal part of a long segment is one *causal* call;
- everything short is gathered into one *masked* call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from midstream.models.extents import ExtentBuilder, ExtentCall, Span

# Below this many tokens a range is gathered into the masked call: a call of its own costs more than the copy.
SHORT_RANGE = 32
# A segment of at most this many tokens attends to itself in the masked call.
SHORT_SEGMENT = 32
# In an extent call, a segment of at most this many tokens is served by chunks of what it sees, which other short ones
# see as well and all cores share; a longer one by blocks of its rows. Behind 4,096 tokens two cores need a fifth less
# time by chunks for 32 rows and a tenth less for 64; with nothing before them, 64 rows are faster by blocks.
CHUNKED_SEGMENT = 32


class Rows(NamedTuple):
    """Rows of the batch: a slice where they are contiguous, else an index tensor."""

    selector: slice | Tensor
    total: int


def rows_of(numbers: Sequence[int], device: torch.device) -> Rows:
    """`numbers` ascend."""
    if numbers[-1] - numbers[0] + 1 == len(numbers):
        return Rows(slice(numbers[0], numbers[-1] + 1), len(numbers))
    return Rows(torch.tensor(numbers, dtype=torch.long, device=device), len(numbers))


class Range(NamedTuple):
    """Slots `start` … `start + length` of the pool, holding positions `position` … of one sequence."""

    start: int
    length: int
    position: int


@dataclass(frozen=True, slots=True)
class RowSegment:
    """`count` rows of the batch from `row` on, at `position`, whose KV goes to slots from `slot` on."""

    row: int
    count: int
    position: int
    slot: int
    seen: tuple[Range, ...]


@dataclass(frozen=True, slots=True)
class DenseCall:
    rows: Rows
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class CausalCall:
    rows: Rows
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class MaskedCall:
    """`mask[i, j]` is 0 where row i sees slot j, else -inf: [rows, slots], in the model's type."""

    rows: Rows
    slots: Tensor
    mask: Tensor


Call = DenseCall | CausalCall | MaskedCall


@dataclass(slots=True)
class AttentionPlan:
    """The segments of a step, and for each sliding window (None: unlimited) the calls that serve them.

    `extents`: whether the kernels serve all of it by an extent call.
    """

    segments: tuple[RowSegment, ...]
    dtype: torch.dtype
    device: torch.device
    num_rows: int
    extents: bool = False
    write_slots: Tensor = field(init=False)
    # What kernels that serve whole steps keep for the layers of this one.
    prepared: dict[Any, Any] = field(default_factory=dict)
    _calls: dict[int | None, tuple[Call, ...]] = field(default_factory=dict)
    _extent_calls: dict[int | None, ExtentCall] = field(default_factory=dict)

    def __post_init__(self) -> None:
        slots = [slot for s in self.segments for slot in range(s.slot, s.slot + s.count)]
        self.write_slots = torch.tensor(slots, dtype=torch.long, device=self.device)

    def calls(self, window: int | None) -> tuple[Call, ...]:
        """The calls of torch's attention for layers that see the last `window` positions (their own included)."""
        window = self._binding(window)
        if window not in self._calls:
            self._calls[window] = self._full_calls() if window is None else self._window_calls(window)
        return self._calls[window]

    def extent_call(self, window: int | None) -> ExtentCall:
        """The one call for such layers where `extents`."""
        window = self._binding(window)
        if window not in self._extent_calls:
            self._extent_calls[window] = self._extent_call(window)
        return self._extent_calls[window]

    def _binding(self, window: int | None) -> int | None:
        """None where no row sees more than the window."""
        if window is not None and all(s.position + s.count <= window for s in self.segments):
            return None
        return window

    # ------------------------------------------------------------------ with a kernel for extents

    def _extent_call(self, window: int | None) -> ExtentCall:
        # The rows of a chunk see the same of a range, which those of a segment behind a window do not.
        most = CHUNKED_SEGMENT if window is None else 1
        short = [s if window is None else _within(s, window) for s in self.segments if s.count <= most]
        builder = ExtentBuilder(window)
        for r, users in joined_ranges(short):
            builder.add(r.start, r.length, _numbers(users))
        for s in self.segments:
            if s.count > most:
                builder.add_block(s.row, s.count, s.position, _spans(s))
            elif s.count > 1:
                builder.add(s.slot, s.count, _numbers([s]), causal=True)
        return builder.call()

    # ------------------------------------------------------------------ unlimited attention

    def _full_calls(self) -> tuple[Call, ...]:
        small = [s for s in self.segments if 1 < s.count <= SHORT_SEGMENT]
        ranges = joined_ranges(self.segments)
        dense = [(r, users) for r, users in ranges if r.length >= SHORT_RANGE]
        short = [(r, users) for r, users in ranges if r.length < SHORT_RANGE]
        if not small and len(short) <= 1:
            dense, short = dense + short, []
        calls: list[Call] = []
        if small or short:
            calls.append(self._masked(small, short))
        calls += [CausalCall(self._rows([s]), s.slot, s.count) for s in self.segments if s.count > SHORT_SEGMENT]
        calls += [DenseCall(self._rows(users), r.start, r.length) for r, users in dense]
        return tuple(calls)

    def _masked(self, small: Sequence[RowSegment], short: Sequence[tuple[Range, tuple[RowSegment, ...]]]) -> MaskedCall:
        users = {s.row: s for s in small}
        users.update({s.row: s for _, seen_by in short for s in seen_by})
        segments = [users[row] for row in sorted(users)]
        offsets = _offsets(segments)
        slots: list[int] = []
        seen: list[tuple[RowSegment, int, int, bool]] = []
        for segment in small:
            seen.append((segment, len(slots), segment.count, True))
            slots.extend(range(segment.slot, segment.slot + segment.count))
        for r, seen_by in short:
            seen.extend((segment, len(slots), r.length, False) for segment in seen_by)
            slots.extend(range(r.start, r.start + r.length))
        mask = torch.full((sum(s.count for s in segments), len(slots)), float("-inf"))
        for segment, column, length, causal in seen:
            rows = slice(offsets[segment.row], offsets[segment.row] + segment.count)
            block = torch.full((segment.count, length), float("-inf")).triu(1) if causal else 0.0
            mask[rows, column : column + length] = block
        return self._masked_call(segments, slots, mask)

    # ------------------------------------------------------------------ sliding windows

    def _window_calls(self, window: int) -> tuple[Call, ...]:
        """One masked call per segment over the slots that its window reaches."""
        calls: list[Call] = []
        for segment in self.segments:
            first = segment.position - window + 1
            own = Range(segment.slot, segment.count, segment.position)
            slots: list[int] = []
            positions: list[int] = []
            for r in [*_cut(segment), own]:
                skip = max(0, first - r.position)
                slots.extend(range(r.start + skip, r.start + r.length))
                positions.extend(range(r.position + skip, r.position + r.length))
            keys = torch.tensor(positions)
            queries = torch.arange(segment.position, segment.position + segment.count)[:, None]
            visible = (keys <= queries) & (keys > queries - window)
            mask = torch.zeros(visible.shape).masked_fill(~visible, float("-inf"))
            calls.append(self._masked_call([segment], slots, mask))
        return tuple(calls)

    # ------------------------------------------------------------------ tensors

    def _masked_call(self, segments: Sequence[RowSegment], slots: list[int], mask: Tensor) -> MaskedCall:
        index = torch.tensor(slots, dtype=torch.long, device=self.device)
        return MaskedCall(self._rows(segments), index, mask.to(device=self.device, dtype=self.dtype))

    def _rows(self, segments: Sequence[RowSegment]) -> Rows:
        return rows_of(_numbers(sorted(segments, key=lambda s: s.row)), self.device)


def _numbers(segments: Sequence[RowSegment]) -> list[int]:
    """The rows of the batch that the segments have."""
    return [row for s in segments for row in range(s.row, s.row + s.count)]


def _cut(segment: RowSegment) -> list[Range]:
    """What a segment sees before itself: a segment of one row has its own slot among `seen`."""
    cut: list[Range] = []
    for r in segment.seen:
        length = min(r.length, segment.position - r.position)
        if length > 0:
            cut.append(Range(r.start, length, r.position))
    return cut


def _within(segment: RowSegment, window: int) -> RowSegment:
    """A segment of one row without what lies before its window."""
    first = segment.position - window + 1
    seen: list[Range] = []
    for r in segment.seen:
        skip = max(0, first - r.position)
        if skip < r.length:
            seen.append(Range(r.start + skip, r.length - skip, r.position + skip))
    return replace(segment, seen=tuple(seen))


def _spans(segment: RowSegment) -> list[Span]:
    """What a segment sees, itself included. Pieces that touch are one, no matter in which step each was read."""
    spans: list[Span] = []
    for r in (*segment.seen, Range(segment.slot, segment.count, segment.position)):
        if spans:
            start, length, position = spans[-1]
            if (start + length, position + length) == (r.start, r.position):
                spans[-1] = Span(start, length + r.length, position)
                continue
        spans.append(Span(*r))
    return spans


def joined_ranges(segments: Sequence[RowSegment]) -> list[tuple[Range, tuple[RowSegment, ...]]]:
    """Distinct ranges with the segments that see them; neighbours seen by the same segments become one."""
    users: dict[Range, list[RowSegment]] = {}
    for segment in segments:
        for r in segment.seen:
            users.setdefault(r, []).append(segment)
    joined: list[tuple[Range, tuple[RowSegment, ...]]] = []
    for r in sorted(users):
        seen_by = tuple(users[r])
        if joined:
            last, last_users = joined[-1]
            touches = last.start + last.length == r.start and last.position + last.length == r.position
            if touches and last_users == seen_by:
                joined[-1] = (Range(last.start, last.length + r.length, last.position), seen_by)
                continue
        joined.append((r, seen_by))
    return joined


def _offsets(segments: Sequence[RowSegment]) -> dict[int, int]:
    offsets: dict[int, int] = {}
    at = 0
    for segment in segments:
        offsets[segment.row] = at
        at += segment.count
    return offsets
