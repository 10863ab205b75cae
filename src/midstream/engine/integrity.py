"""Checks of the KV tree's invariants. Slow but safe to call in production; the tests call it after every step."""

from __future__ import annotations

from collections import Counter

from midstream.engine.extents import Extent
from midstream.engine.kv_tree import KVTree, Node


def check_integrity(tree: KVTree) -> None:
    """Raise AssertionError where the tree breaks an invariant: overlap, lost slots, wrong counts, wrong shape."""
    _check_extents(tree)
    _check_references(tree)
    for node in tree.nodes():
        _check_node(node)


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
