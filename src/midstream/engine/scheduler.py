"""Which tokens go into the next forward. Plain Python: no tensor is touched here."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from midstream.engine.kv_tree import KVTree, Node, OutOfSlots
from midstream.engine.pace import Pace
from midstream.engine.request import Branch, Job
from midstream.engine.step import Harvest, Segment, Step

# A branch with at most this many tokens to compute goes before longer ones, so that a call on a warm prefix is
# not queued behind a long prefill; they may take this share of a step, so that long ones always move.
SHORT_TOKENS = 32
SHORT_SHARE = 0.75


@dataclass(frozen=True, slots=True)
class _Piece:
    branch: Branch
    node: Node
    offset: int
    count: int


class Scheduler:
    """Admission in arrival order, then continuous batching with chunked prefill.

    Slots for a branch's whole life (prompt and `max_tokens`) are reserved at admission, so a running branch is
    never preempted: pressure on memory delays admission and nothing else. `pace` bounds the part of a step that long
    prefills have: what comes while it runs waits no longer.
    """

    def __init__(self, tree: KVTree, *, max_step_tokens: int, max_running: int, pace: Pace) -> None:
        self.tree = tree
        self.pace = pace
        self.waiting: deque[Branch] = deque()
        self.running: list[Branch] = []
        self._max_step_tokens = max_step_tokens
        self._max_running = max_running

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, branches: Iterable[Branch]) -> None:
        self.waiting.extend(branches)

    def add_first(self, branches: Sequence[Branch]) -> None:
        """Put branches before all others: those of requests that have run already."""
        self.waiting.extendleft(reversed(branches))

    def remove(self, job: Job) -> None:
        """Take a job's branches out and give their slots back."""
        self.waiting = deque(s for s in self.waiting if s.job is not job)
        for branch in [s for s in self.running if s.job is job]:
            self.retire(branch)

    def retire(self, branch: Branch) -> None:
        """End a running branch; its computed KV stays in the tree for others."""
        self.running.remove(branch)
        if branch.lease is not None:
            self.tree.release(branch.lease)
            branch.lease = None

    def schedule(self) -> Step | None:
        """Admit what fits and plan one forward; None when there is nothing to compute."""
        self._admit()
        return _packed(self._plan(self.running))

    def schedule_only(self, job: Job) -> Step | None:
        """Plan one forward of a running job alone."""
        return _packed(self._plan([branch for branch in self.running if branch.job is job]))

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self._max_running:
            branch = self.waiting[0]
            job = branch.job
            context = branch.context
            owned_from = len(context) if job.owner is None else job.owned_from
            try:
                lease = self.tree.lease(context, owned_from, job.owner, branch.growth, job.scope)
            except OutOfSlots:
                return
            self.waiting.popleft()
            branch.lease = lease
            job.leased = True
            self.running.append(branch)
            for token in branch.output[branch.own_from :][: branch.growth]:
                self.tree.append(lease, token)

    def _plan(self, running: Sequence[Branch]) -> list[_Piece]:
        planned: dict[Node, int] = {}
        most = self._max_step_tokens
        short, long = _by_length(running)
        first = _fill(short, planned, most - int(most * (1 - SHORT_SHARE)) if long else most)
        left = most - sum(piece.count for piece in first)
        return first + _fill(long, planned, min(left, self.pace.tokens(most)))


def _fill(branches: Sequence[Branch], planned: dict[Node, int], limit: int) -> list[_Piece]:
    """The next tokens of the branches, in their order, at most `limit` of them."""
    pieces: list[_Piece] = []
    for branch in branches:
        if limit <= 0:
            break
        new = _plan_branch(branch, planned, limit)
        limit -= sum(piece.count for piece in new)
        pieces.extend(new)
    return pieces


def _by_length(running: Sequence[Branch]) -> tuple[list[Branch], list[Branch]]:
    short: list[Branch] = []
    long: list[Branch] = []
    for branch in running:
        assert branch.lease is not None
        left = sum(len(node.tokens) - node.computed for node in branch.lease.nodes())
        (short if left <= SHORT_TOKENS else long).append(branch)
    return short, long


def _plan_branch(branch: Branch, planned: dict[Node, int], budget: int) -> list[_Piece]:
    """The next tokens of a branch, top of the path first, after what this step has planned already."""
    assert branch.lease is not None
    pieces: list[_Piece] = []
    for node in branch.lease.nodes():
        done = planned.get(node, node.computed)
        count = min(len(node.tokens) - done, budget)
        if count > 0:
            pieces.append(_Piece(branch, node, done, count))
            planned[node] = done + count
            budget -= count
        if planned.get(node, node.computed) < len(node.tokens):
            break
    return pieces


def _packed(pieces: list[_Piece]) -> Step | None:
    if not pieces:
        return None
    ordered = sorted(pieces, key=lambda piece: (piece.node.owner is not None, piece.node.owner or ""))
    segments: list[Segment] = []
    groups: list[tuple[str, int, int]] = []
    row = 0
    for piece in ordered:
        node = piece.node
        segments.append(Segment(piece.branch, node, piece.offset, piece.count, row, _ancestors(node)))
        end = row + piece.count
        if node.owner is not None:
            if groups and groups[-1][0] == node.owner:
                groups[-1] = (node.owner, groups[-1][1], end)
            else:
                groups.append((node.owner, row, end))
        row = end
    return Step(tuple(segments), tuple(groups), tuple(_harvests(segments)), row)


def _ancestors(node: Node) -> tuple[Node, ...]:
    return tuple(node.path()[:-1])


def _harvests(segments: list[Segment]) -> list[Harvest]:
    """For branches whose tail is complete after this step: the row to sample from, or the tail's rows to score."""
    by_branch: dict[Branch, list[Segment]] = {}
    for segment in segments:
        lease = segment.branch.lease
        if lease is not None and segment.node in lease.tail:
            by_branch.setdefault(segment.branch, []).append(segment)
    harvests: list[Harvest] = []
    for branch, own in by_branch.items():
        own.sort(key=lambda segment: segment.position)
        rows = tuple(segment.row + i for segment in own for i in range(segment.count))
        if branch.scoring:
            harvests.append(Harvest(branch, rows))
        elif _reaches_end(branch, own[-1]):
            harvests.append(Harvest(branch, rows[-1:]))
    return harvests


def _reaches_end(branch: Branch, last: Segment) -> bool:
    assert branch.lease is not None
    return last.node is branch.lease.tail[-1] and last.offset + last.count == len(last.node.tokens)
