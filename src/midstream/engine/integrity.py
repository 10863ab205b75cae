"""Checks of the invariants of the KV tree and the schedule. Slow, but safe in production; the tests run them often."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from midstream.engine.extents import Extent
from midstream.engine.kv_tree import KVTree, Node
from midstream.engine.request import Branch, Job
from midstream.engine.scheduler import Scheduler


def check_integrity(tree: KVTree) -> None:
    """Raise AssertionError where the tree breaks an invariant: overlap, lost slots, wrong counts, wrong shape."""
    _check_extents(tree)
    _check_references(tree)
    for node in tree.nodes():
        _check_node(node)


def check_schedule(scheduler: Scheduler, jobs: Iterable[Job]) -> None:
    """Raise AssertionError where a lease outlives its branch, or a branch of the live `jobs` has two places or none."""
    leases = {branch.lease for branch in scheduler.running}
    _require(leases == scheduler.tree.leases, "leases are held that no running branch has")
    places: Counter[Branch] = Counter([*scheduler.running, *scheduler.waiting])
    for job in jobs:
        for branch in (branch for part in (job, *job.running_calls) for branch in part.branches):
            found = places.pop(branch, 0) + (branch.finish is not None) + (branch.call is not None)
            _require(found == 1, f"a branch of {job.request_id} has {found} places of: queue, forward, call, end")
    _require(not places, "branches are scheduled for requests that have ended")


def _check_extents(tree: KVTree) -> None:
    held = [(node.start, node.capacity) for node in tree.nodes()]
    for lease in tree.leases:
        held += [(node.start, node.capacity) for node in lease.tail] + list(lease.reserve)
    free = tree.slots.free_extents
    _require(sum(extent.length for extent in free) == tree.slots.num_free, "the free count is off")
    at = 0
    for start, length in sorted([*held, *free]):
        _require(length > 0, f"an empty extent at slot {start}")
        _require(start == at, f"slots {min(at, start)}..{max(at, start)} are lost or owned twice")
        at = Extent(start, length).end
    _require(at == tree.num_slots, f"slots {at}..{tree.num_slots} are lost")


def _check_references(tree: KVTree) -> None:
    expected: Counter[int] = Counter()
    for lease in tree.leases:
        expected.update(id(node) for node in lease.prompt_leaf.path())
    for node in tree.nodes():
        _require(node.refs == expected[id(node)], f"{node.refs} references, {expected[id(node)]} leases")


def _check_node(node: Node) -> None:
    parent = node.parent
    assert parent is not None
    _require(parent.children.get(node.edge) is node, "a child hangs at the wrong edge")
    _require(node.position == parent.position + len(parent.tokens), "a node is at the wrong position")
    _require(node.capacity == len(node.tokens) > 0, "a node's extent does not fit its tokens")
    _require(0 <= node.computed <= len(node.tokens), "more KV computed than tokens")
    _require(node.computed == 0 or parent.complete, "KV computed below a node without KV")
    _require(node.complete or node.refs > 0, "an incomplete node that nobody computes")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)
