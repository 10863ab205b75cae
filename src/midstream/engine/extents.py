"""Contiguous ranges of KV slots: which are free, and handing them out."""

from __future__ import annotations

from bisect import bisect_left
from typing import NamedTuple


class Extent(NamedTuple):
    """`length` slots of the pool from `start` on."""

    start: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.length


class ExtentAllocator:
    """First-fit allocation over `num_slots` slots. Free extents are kept sorted and never touch each other."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.num_free = num_slots
        self._free: list[Extent] = [Extent(0, num_slots)] if num_slots else []

    @property
    def free_extents(self) -> tuple[Extent, ...]:
        return tuple(self._free)

    def allocate(self, length: int) -> list[Extent]:
        """`length` slots as one extent where one is long enough, else as several, longest first.

        The caller makes sure that `length` ≤ `num_free`.
        """
        if length > self.num_free:
            raise ValueError(f"{length} slots asked, {self.num_free} free")
        pieces: list[Extent] = []
        while length:
            index = next((i for i, extent in enumerate(self._free) if extent.length >= length), None)
            if index is None:
                index = max(range(len(self._free)), key=lambda i: self._free[i].length)
            hole = self._free[index]
            taken = Extent(hole.start, min(length, hole.length))
            if taken.length == hole.length:
                del self._free[index]
            else:
                self._free[index] = Extent(taken.end, hole.length - taken.length)
            self.num_free -= taken.length
            length -= taken.length
            pieces.append(taken)
        return pieces

    def release(self, extent: Extent) -> None:
        """Give slots back, joining them with free neighbours."""
        if not extent.length:
            return
        index = bisect_left(self._free, extent)
        start, end = extent.start, extent.end
        if index < len(self._free) and self._free[index].start == end:
            end = self._free[index].end
            del self._free[index]
        if index > 0 and self._free[index - 1].end == start:
            start = self._free[index - 1].start
            del self._free[index - 1]
            index -= 1
        self._free.insert(index, Extent(start, end - start))
        self.num_free += extent.length
