"""How the rows of one forward attend to the KV pool, worked out once per step and shared by all layers.

A row sees a set of pool ranges in full, and its own segment causally. Ranges are cut so that each is seen whole by
some set of segments; ranges that touch and are seen by the same segments are joined; then

- ranges that few rows see make one *extent* call, where there is a kernel that reads them where they lie;
- a long range is one *dense* call for all rows that see it: rows that share a prefix read it once (cascade attention);
- the causal part of a long segment is one *causal* call;
- everything short is gathered into one *masked* call.

The calls' results are merged by their log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from midstream.models.extents import ExtentBuilder, ExtentCall, Rows, rows_of

# Below this many tokens a range is gathered into the masked call: a call of its own costs more than the copy.
SHORT_RANGE = 32
# A segment of at most this many tokens attends to itself in the masked call.
SHORT_SEGMENT = 32


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


Call = DenseCall | CausalCall | MaskedCall | ExtentCall


@dataclass(slots=True)
class AttentionPlan:
    """The segments of a step, and for each sliding window (None: unlimited) the calls that serve them.

    Ranges that at most `few_rows` rows see go to an extent call; 0 where there is no kernel for them.
    """

    segments: tuple[RowSegment, ...]
    dtype: torch.dtype
    device: torch.device
    num_rows: int
    few_rows: int = 0
    write_slots: Tensor = field(init=False)
    # What kernels that serve whole steps keep for the layers of this one.
    prepared: dict[Any, Any] = field(default_factory=dict)
    _calls: dict[int | None, tuple[Call, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        slots = [slot for s in self.segments for slot in range(s.slot, s.slot + s.count)]
        self.write_slots = torch.tensor(slots, dtype=torch.long, device=self.device)

    def calls(self, window: int | None) -> tuple[Call, ...]:
        """The calls for layers that see the last `window` positions (their own included)."""
        if window is not None and all(s.position + s.count <= window for s in self.segments):
            window = None
        if window not in self._calls:
            self._calls[window] = self._make_calls(window)
        return self._calls[window]

    def _make_calls(self, window: int | None) -> tuple[Call, ...]:
        if window is not None:
            return self._window_calls(window)
        return self._extent_calls() if self.few_rows else self._full_calls()

    # ------------------------------------------------------------------ with a kernel for few rows

    def _extent_calls(self) -> tuple[Call, ...]:
        few = ExtentBuilder()
        calls: list[Call] = []
        for r, users in joined_ranges(self.segments):
            rows = _numbers(users)
            if len(rows) <= self.few_rows:
                few.add(r.start, r.length, rows)
            else:
                calls.append(DenseCall(self._rows(users), r.start, r.length))
        for s in self.segments:
            if s.count > SHORT_SEGMENT:
                calls.append(CausalCall(self._rows([s]), s.slot, s.count))
            elif s.count > 1:
                few.add(s.slot, s.count, _numbers([s]), causal=True)
        call = few.call()
        return tuple(calls) if call is None else (*calls, call)

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
        """One masked call per segment over the slots that its window reaches; single rows in one extent call."""
        calls: list[Call] = []
        few = ExtentBuilder()
        for segment in self.segments:
            first = segment.position - window + 1
            if self.few_rows and segment.count == 1:
                for r in segment.seen:
                    skip = max(0, first - r.position)
                    few.add(r.start + skip, max(0, r.length - skip), [segment.row])
                continue
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
        call = few.call()
        return tuple(calls) if call is None else (*calls, call)

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
