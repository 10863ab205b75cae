"""The Step: one frozen plan of a forward, made by the scheduler, run by the runner, committed by the engine."""

from __future__ import annotations

from dataclasses import dataclass

from midstream.engine.kv_tree import Node
from midstream.engine.request import Branch


@dataclass(frozen=True, slots=True)
class Segment:
    """`count` tokens of `node` from `offset` on, computed on behalf of `branch`.

    `row` is the first of its rows in the packed batch. The rows see all KV of `ancestors`, the node's KV before
    `offset`, and causally one another.
    """

    branch: Branch
    node: Node
    offset: int
    count: int
    row: int
    ancestors: tuple[Node, ...]

    @property
    def position(self) -> int:
        return self.node.position + self.offset

    @property
    def tokens(self) -> list[int]:
        return self.node.tokens[self.offset : self.offset + self.count]


@dataclass(frozen=True, slots=True)
class Harvest:
    """Rows of the batch whose logits a branch needs: the last row to sample, all of them to score."""

    branch: Branch
    rows: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """Segments packed in one batch, base rows first, then each adapter's rows together.

    `groups` are (digest, first row, end row) of the rows that an adapter owns.
    """

    segments: tuple[Segment, ...]
    groups: tuple[tuple[str, int, int], ...]
    harvests: tuple[Harvest, ...]
    num_tokens: int
