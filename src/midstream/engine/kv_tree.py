"""The KV tree: which slots hold the KV of which sequence, shared wherever two sequences agree.

KV at position t depends on token[0..t] and owner[0..t], so the tree's edges are (token, owner) pairs:

    root ── "system … question" (None) ──┬── "answer" (None) ── "next question" (None)
                                         ├── "<invocation> label" (digest of A)
                                         └── "<invocation> label" (digest of B)

Each node owns one extent of the pool for its tokens. A running sequence holds a *lease*: a reference on every node
of its prompt, and private *tail* nodes that nobody else sees, into which it grows. The tail begins with the last
prompt token, because a sequence must compute at least one token itself to have logits. When the lease ends, the
computed part of its tail joins the tree.

Each *scope* has a root of its own, so that nothing is shared between two of them; they share the pool.

Nodes may be inserted before their KV is computed (`computed` < length): whichever lease is scheduled first computes
them, the others wait in the same step or a later one. That is how requests that arrive together share a cold prefix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

from midstream.engine.extents import Extent, ExtentAllocator

Owner = str | None
Edge = tuple[int, Owner]


class OutOfSlots(Exception):
    """No room even after evicting all that nobody uses; the caller waits for a running sequence to end."""


@dataclass(eq=False, slots=True)
class Node:
    """`tokens` with one owner, at `position` of their sequence, with KV in slots `start` … `start + capacity`."""

    tokens: list[int]
    owner: Owner
    position: int
    start: int
    capacity: int
    parent: Node | None
    computed: int = 0
    refs: int = 0
    last_used: int = 0
    children: dict[Edge, Node] = field(default_factory=dict)

    @property
    def edge(self) -> Edge:
        return self.tokens[0], self.owner

    @property
    def complete(self) -> bool:
        return self.computed == len(self.tokens)

    def path(self) -> list[Node]:
        """From below the root down to this node."""
        nodes: list[Node] = []
        node: Node | None = self
        while node is not None and node.parent is not None:
            nodes.append(node)
            node = node.parent
        nodes.reverse()
        return nodes


@dataclass(eq=False, slots=True)
class Lease:
    """A running sequence's hold on the tree. `reserve` are extents into which the tail grows when one is full."""

    prompt_leaf: Node
    tail: list[Node]
    reserve: list[Extent]
    open: bool = True

    def nodes(self) -> list[Node]:
        """Every node of the sequence in order."""
        return self.prompt_leaf.path() + self.tail

    @property
    def complete(self) -> bool:
        return all(node.complete for node in self.tail)


class KVTree:
    """A radix tree over (token, owner) pairs that owns all extents of a pool of `num_slots` slots."""

    def __init__(self, num_slots: int) -> None:
        self.slots = ExtentAllocator(num_slots)
        self._roots: dict[str, Node] = {}
        self.leases: set[Lease] = set()
        self._clock = 0

    @property
    def num_slots(self) -> int:
        return self.slots.num_slots

    def cached_prefix(self, tokens: Sequence[int], activation: int, owner: Owner, scope: str = "") -> int:
        """How many leading tokens have computed KV in the tree, without changing anything.

        `owner` computes the tokens from `activation` on, the base model those before it.
        """
        node, at = self._root(scope), 0
        while at < len(tokens):
            child = node.children.get((tokens[at], owner if at >= activation else None))
            if child is None:
                return at
            end = activation if at < activation else len(tokens)
            common = _common(child.tokens, tokens, at, end)
            at += min(common, child.computed)
            if min(common, child.computed) < len(child.tokens):
                return at
            node = child
        return at

    def lease(self, tokens: Sequence[int], activation: int, owner: Owner, growth: int, scope: str = "") -> Lease:
        """Take the prompt `tokens` (at least one) and room for `growth` tokens more.

        Raises OutOfSlots, with the tree's content unchanged but for evictions of unused nodes.
        """
        shared = tokens[:-1]
        leaf, matched = self._descend(self._root(scope), shared, activation, owner)
        self._hold(leaf, +1)
        needed = len(shared) - matched + 1 + growth
        if not self._make_room(needed):
            self._hold(leaf, -1)
            raise OutOfSlots(f"{needed} slots needed")
        pieces = self.slots.allocate(needed)
        leaf = self._extend(leaf, shared, matched, activation, owner, pieces)
        first = pieces.pop(0)
        tail = Node([tokens[-1]], owner, len(shared), first.start, first.length, leaf, refs=1)
        lease = Lease(leaf, [tail], pieces)
        self.leases.add(lease)
        return lease

    def append(self, lease: Lease, token: int) -> None:
        """Add one token to the lease's tail; its slot was reserved by `lease`."""
        node = lease.tail[-1]
        if len(node.tokens) < node.capacity:
            node.tokens.append(token)
            return
        extent = lease.reserve.pop(0)
        position = node.position + len(node.tokens)
        lease.tail.append(Node([token], node.owner, position, extent.start, extent.length, node, refs=1))

    def release(self, lease: Lease) -> None:
        """End a lease: the computed part of its tail joins the tree, everything else it held is freed."""
        if not lease.open:
            return
        lease.open = False
        self.leases.remove(lease)
        for extent in lease.reserve:
            self.slots.release(extent)
        self._graft_tail(lease)
        leaf: Node | None = lease.prompt_leaf
        self._hold(lease.prompt_leaf, -1)
        # Deepest first: an incomplete node that nobody holds has no computed descendants.
        while leaf is not None and leaf.parent is not None:
            parent = leaf.parent
            if leaf.refs == 0 and not leaf.complete:
                self._trim(leaf)
            leaf = parent

    def evict_all(self, scope: str | None = None) -> None:
        """Free every node that no lease holds, or those of one scope."""
        self._evict(self.num_slots, scope)

    def nodes(self, scope: str | None = None) -> Iterator[Node]:
        """All nodes that are in the tree, or those of one scope (tails of running sequences are not)."""
        roots = self._roots.values() if scope is None else [self._root(scope)]
        stack = [child for root in roots for child in root.children.values()]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    # ------------------------------------------------------------------ inside

    def _root(self, scope: str) -> Node:
        return self._roots.setdefault(scope, Node([], None, 0, 0, 0, None))

    def _descend(self, root: Node, tokens: Sequence[int], activation: int, owner: Owner) -> tuple[Node, int]:
        """The node that ends the longest common prefix, splitting one where the prefix ends inside it."""
        node, at = root, 0
        while at < len(tokens):
            child = node.children.get((tokens[at], owner if at >= activation else None))
            if child is None:
                break
            end = activation if at < activation else len(tokens)
            common = _common(child.tokens, tokens, at, min(end, len(tokens)))
            if common < len(child.tokens):
                child = self._split(child, common)
            node, at = child, at + common
        return node, at

    def _split(self, node: Node, at: int) -> Node:
        """Cut `node` in two and return the new upper part. `node` itself stays the lower part: leases point at ends."""
        upper = Node(
            node.tokens[:at],
            node.owner,
            node.position,
            node.start,
            at,
            node.parent,
            computed=min(node.computed, at),
            refs=node.refs,
            last_used=node.last_used,
        )
        assert node.parent is not None
        node.parent.children[upper.edge] = upper
        node.tokens = node.tokens[at:]
        node.position += at
        node.start += at
        node.capacity -= at
        node.computed = max(0, node.computed - at)
        node.parent = upper
        upper.children[node.edge] = node
        return upper

    def _extend(
        self, leaf: Node, tokens: Sequence[int], at: int, activation: int, owner: Owner, pieces: list[Extent]
    ) -> Node:
        """Insert tokens[at:] below `leaf` as nodes without KV, taking their slots from the front of `pieces`."""
        while at < len(tokens):
            end = activation if at < activation else len(tokens)
            extent = pieces[0]
            length = min(end, len(tokens), at + extent.length) - at
            node_owner = None if at < activation else owner
            node = Node(list(tokens[at : at + length]), node_owner, at, extent.start, length, leaf, refs=1)
            node.last_used = self._clock
            leaf.children[node.edge] = node
            leaf, at = node, at + length
            if length == extent.length:
                pieces.pop(0)
            else:
                pieces[0] = Extent(extent.start + length, extent.length - length)
        return leaf

    def _hold(self, leaf: Node, change: int) -> None:
        self._clock += 1
        node: Node | None = leaf
        while node is not None:
            node.refs += change
            node.last_used = self._clock
            node = node.parent

    def _graft_tail(self, lease: Lease) -> None:
        parent: Node | None = lease.prompt_leaf
        if any(not node.complete for node in lease.prompt_leaf.path()):
            parent = None
        for node in lease.tail:
            spare = Extent(node.start + node.computed, node.capacity - node.computed)
            cut_short = not node.complete
            self.slots.release(spare)
            del node.tokens[node.computed :]
            node.capacity = node.computed
            node.refs = 0
            node.last_used = self._clock
            if node.tokens and parent is not None:
                parent = self._graft(parent, node)
            else:
                self.slots.release(Extent(node.start, node.capacity))
            if cut_short:
                parent = None

    def _graft(self, parent: Node, node: Node) -> Node | None:
        """Hang `node` below `parent`, dropping what the tree has already. None if the way down has no KV yet."""
        while True:
            child = parent.children.get(node.edge)
            if child is None:
                node.parent = parent
                parent.children[node.edge] = node
                return node
            common = _common(child.tokens, node.tokens, 0, len(node.tokens))
            if child.computed < common:
                self.slots.release(Extent(node.start, node.capacity))
                return None
            if common < len(child.tokens):
                child = self._split(child, common)
            self.slots.release(Extent(node.start, common))
            node.tokens = node.tokens[common:]
            node.position += common
            node.start += common
            node.capacity -= common
            node.computed -= common
            parent = child
            if not node.tokens:
                return parent

    def _trim(self, node: Node) -> None:
        """Cut an unheld node down to its computed part; remove it when that is empty."""
        assert not node.children
        assert node.parent is not None
        self.slots.release(Extent(node.start + node.computed, node.capacity - node.computed))
        if node.computed == 0:
            del node.parent.children[node.edge]
            return
        del node.tokens[node.computed :]
        node.capacity = node.computed

    def _make_room(self, needed: int) -> bool:
        if self.slots.num_free < needed:
            self._evict(needed)
        return self.slots.num_free >= needed

    def _evict(self, needed: int, scope: str | None = None) -> None:
        """Free least recently used leaves that nobody holds until `needed` slots are free or none is left."""
        heap = [(node.last_used, id(node), node) for node in self.nodes(scope) if not node.children and not node.refs]
        heapify(heap)
        while heap and self.slots.num_free < needed:
            _, _, node = heappop(heap)
            parent = node.parent
            assert parent is not None
            del parent.children[node.edge]
            self.slots.release(Extent(node.start, node.capacity))
            if parent.parent is not None and not parent.children and not parent.refs:
                heappush(heap, (parent.last_used, id(parent), parent))


def _common(edge: Sequence[int], tokens: Sequence[int], at: int, end: int) -> int:
    """Length of the common prefix of `edge` and tokens[at:end]."""
    limit = min(len(edge), end - at)
    if list(edge[:limit]) == list(tokens[at : at + limit]):
        return limit
    for index in range(limit):
        if edge[index] != tokens[at + index]:
            return index
    return limit
