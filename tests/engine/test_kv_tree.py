"""The KV tree without a model: slots hold a fingerprint of what their KV would depend on."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from midstream.engine.extents import ExtentAllocator
from midstream.engine.integrity import check_integrity
from midstream.engine.kv_tree import KVTree, Lease, OutOfSlots


class Memory:
    """What a forward would write: for each slot, the whole prefix of tokens and owners that its KV depends on."""

    def __init__(self, tree: KVTree) -> None:
        self.tree = tree
        self.slots: dict[int, tuple[tuple[int, str | None], ...]] = {}

    def compute(self, lease: Lease, budget: int) -> int:
        """Compute up to `budget` tokens of a lease, top down; return how many."""
        done = 0
        prefix: list[tuple[int, str | None]] = []
        for node in lease.nodes():
            for offset, token in enumerate(node.tokens):
                prefix.append((token, node.owner))
                if offset < node.computed:
                    continue
                if done == budget:
                    return done
                self.slots[node.start + offset] = tuple(prefix)
                node.computed = offset + 1
                done += 1
        return done

    def check(self) -> None:
        """Every computed slot in the tree and in the leases holds exactly its own prefix."""
        paths = [node.path() for node in self.tree.nodes() if not node.children]
        paths += [lease.nodes() for lease in self.tree.leases]
        for path in paths:
            prefix: list[tuple[int, str | None]] = []
            for node in path:
                for offset, token in enumerate(node.tokens):
                    prefix.append((token, node.owner))
                    if offset < node.computed:
                        assert self.slots[node.start + offset] == tuple(prefix)


PROMPT = st.lists(st.integers(0, 2), min_size=1, max_size=12)
OPERATION = st.one_of(
    st.tuples(st.just("lease"), PROMPT, st.integers(0, 12), st.sampled_from([None, "A", "B"]), st.integers(0, 6)),
    st.tuples(st.just("compute"), st.integers(0, 9), st.integers(1, 8)),
    st.tuples(st.just("append"), st.integers(0, 9), st.integers(0, 2)),
    st.tuples(st.just("release"), st.integers(0, 9)),
    st.tuples(st.just("evict")),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(OPERATION, max_size=40), st.integers(20, 60))
def test_random_operations_keep_every_invariant(operations: list[tuple], num_slots: int) -> None:
    tree = KVTree(num_slots)
    memory = Memory(tree)
    leases: list[tuple[Lease, int]] = []
    for operation in operations:
        if operation[0] == "lease":
            _, prompt, activation, owner, growth = operation
            start = len(prompt) if owner is None else min(activation, len(prompt) - 1)
            try:
                leases.append((tree.lease(prompt, start, owner, growth), len(prompt) + growth))
            except OutOfSlots:
                assert num_slots < 13 + 7 or leases
        elif operation[0] == "evict":
            tree.evict_all()
        elif leases:
            index = operation[1] % len(leases)
            lease, limit = leases[index]
            if operation[0] == "compute":
                memory.compute(lease, operation[2])
            elif operation[0] == "append":
                held = sum(len(node.tokens) for node in lease.nodes())
                if held < limit:
                    tree.append(lease, operation[2])
            else:
                tree.release(lease)
                del leases[index]
        check_integrity(tree)
        memory.check()
    for lease, _ in leases:
        tree.release(lease)
    check_integrity(tree)
    tree.evict_all()
    assert tree.slots.num_free == num_slots
    assert not list(tree.nodes())


def finish(tree: KVTree, tokens: list[int], activation: int, owner: str | None) -> None:
    lease = tree.lease(tokens, activation, owner, 0)
    Memory(tree).compute(lease, 10**6)
    tree.release(lease)


def test_one_scope_can_be_emptied_and_the_others_keep_their_kv() -> None:
    tree = KVTree(100)
    for scope in ("one", "other"):
        lease = tree.lease([1, 2, 3], 3, None, 0, scope)
        Memory(tree).compute(lease, 10**6)
        tree.release(lease)
    held = tree.lease([1, 2, 9], 3, None, 0, "one")
    tree.evict_all("one")
    assert tree.cached_prefix([1, 2, 3], 3, None, "one") == 2
    assert tree.cached_prefix([1, 2, 3], 3, None, "other") == 3
    tree.release(held)
    tree.evict_all("one")
    assert tree.cached_prefix([1, 2, 3], 3, None, "one") == 0
    check_integrity(tree)


def test_an_alora_shares_the_base_prefix_and_a_lora_shares_nothing() -> None:
    tree = KVTree(100)
    finish(tree, [1, 2, 3, 4], 4, None)
    assert tree.cached_prefix([1, 2, 3, 4, 9, 9], 4, "A") == 4
    assert tree.cached_prefix([1, 2, 3, 4, 9, 9], 0, "L") == 0


def test_the_base_model_never_hits_an_adapters_kv() -> None:
    tree = KVTree(100)
    finish(tree, [1, 2, 3, 4, 5], 2, "A")
    assert tree.cached_prefix([1, 2, 3, 4, 5], 5, None) == 2
    assert tree.cached_prefix([1, 2, 3, 4, 5], 2, "B") == 2
    assert tree.cached_prefix([1, 2, 3, 4, 5], 2, "A") == 5


def test_an_adapter_takes_over_where_a_sequence_ends_and_the_base_model_takes_up_where_it_stopped() -> None:
    """An invocation `8 9` at the end of an output: its last token was sampled and has no KV yet."""
    tree = KVTree(100)
    memory = Memory(tree)
    base = tree.lease([1, 2, 3], 3, None, 6)
    for token in (4, 8):
        tree.append(base, token)
    memory.compute(base, 100)
    tree.append(base, 9)
    tree.release(base)
    called = [1, 2, 3, 4, 8, 9]
    call = tree.lease(called, 4, "A", 2)
    assert memory.compute(call, 100) == 2
    tree.append(call, 5)
    tree.release(call)
    memory.check()
    check_integrity(tree)
    assert tree.cached_prefix([*called, 5], 7, None) == 5
    resumed = tree.lease([*called, 5, 6], 8, None, 0)
    assert memory.compute(resumed, 100) == 3
    tree.release(resumed)
    memory.check()
    check_integrity(tree)


def test_leases_that_arrive_together_share_what_nobody_has_computed_yet() -> None:
    tree = KVTree(100)
    first = tree.lease([1, 2, 3, 4, 5], 5, None, 0)
    second = tree.lease([1, 2, 3, 4, 6], 5, None, 0)
    assert first.prompt_leaf is second.prompt_leaf
    memory = Memory(tree)
    assert memory.compute(first, 100) == 5
    assert memory.compute(second, 100) == 1
    tree.release(first)
    tree.release(second)
    check_integrity(tree)
    assert tree.cached_prefix([1, 2, 3, 4, 6], 5, None) == 5


def test_a_cancelled_lease_leaves_its_uncomputed_prefix_to_those_who_share_it() -> None:
    tree = KVTree(100)
    first = tree.lease([1, 2, 3, 4, 5], 5, None, 0)
    second = tree.lease([1, 2, 3, 9], 4, None, 0)
    memory = Memory(tree)
    memory.compute(first, 2)
    tree.release(first)
    check_integrity(tree)
    memory.compute(second, 100)
    tree.release(second)
    check_integrity(tree)
    memory.check()
    assert tree.cached_prefix([1, 2, 3, 9], 4, None) == 4


def test_eviction_takes_the_least_recently_used_leaf_and_never_a_held_one() -> None:
    tree = KVTree(12)
    finish(tree, [1, 1, 1, 1], 4, None)
    finish(tree, [2, 2, 2, 2], 4, None)
    held = tree.lease([1, 1, 1, 1], 4, None, 0)
    finish(tree, [3, 3, 3, 3], 4, None)
    finish(tree, [4, 4, 4, 4], 4, None)
    assert tree.cached_prefix([2, 2, 2, 2], 4, None) == 0
    assert tree.cached_prefix([1, 1, 1], 3, None) == 3
    with pytest.raises(OutOfSlots):
        tree.lease([5] * 12, 12, None, 0)
    tree.release(held)
    check_integrity(tree)


def test_a_tail_grows_over_several_extents_when_memory_is_in_pieces() -> None:
    tree = KVTree(10)
    leases = [tree.lease([n, n], 2, None, 0) for n in range(5)]
    for lease in leases[::2]:
        tree.release(lease)
    grown = tree.lease([7], 1, None, 5)
    for token in range(5):
        tree.append(grown, token)
    assert [token for node in grown.tail for token in node.tokens] == [7, 0, 1, 2, 3, 4]
    check_integrity(tree)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 9)), max_size=50))
def test_the_allocator_never_loses_or_doubles_a_slot(operations: list[tuple[bool, int]]) -> None:
    slots = ExtentAllocator(40)
    held = []
    for take, length in operations:
        if take and length <= slots.num_free:
            held.extend(slots.allocate(length))
        elif held:
            slots.release(held.pop(length % len(held)))
        owned = [slot for extent in held for slot in range(extent.start, extent.end)]
        free = [slot for extent in slots.free_extents for slot in range(extent.start, extent.end)]
        assert sorted(owned + free) == list(range(40))
        assert all(a.end < b.start for a, b in zip(slots.free_extents, slots.free_extents[1:], strict=False))


def test_the_tree_and_the_scheduler_import_no_torch() -> None:
    code = "import sys, midstream.engine.scheduler, midstream.engine.kv_tree; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
