from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from midstream.adapters import Adapter, AdapterRegistry, AdapterSpec, LoraWeights, TargetSpec
from midstream.errors import AdapterError, AdapterNotFound


def adapter(name: str, size: int = 10, digest: str = "d") -> Adapter:
    spec = AdapterSpec(name, ".", "lora", (), "", (TargetSpec("m", 1, 1.0),), "any")
    return Adapter(spec, f"{name}-{digest}", {"m": LoraWeights(torch.zeros(1, 1), torch.zeros(1, 1), 1.0)}, size)


def names(registry: AdapterRegistry) -> list[str]:
    return [info.name for info in registry.infos()]


def test_the_least_recently_used_goes_first_and_never_one_in_use_or_pinned() -> None:
    registry = AdapterRegistry(30)
    for name in "abc":
        registry.add(adapter(name))
    registry.pin("a")
    held = registry.acquire("b")
    registry.add(adapter("d"))
    assert names(registry) == ["a", "b", "d"]
    registry.acquire("d")
    with pytest.raises(AdapterError, match="needs 10 bytes; of the budget of 30 only 0 can be freed"):
        registry.add(adapter("e"))
    registry.release(held)
    registry.add(adapter("e"))
    assert names(registry) == ["a", "d", "e"]
    registry.check_integrity()


def test_running_requests_keep_an_adapter_that_was_replaced_or_removed() -> None:
    registry = AdapterRegistry(100)
    registry.add(adapter("a", digest="old"))
    held = registry.acquire("a")
    registry.add(adapter("a", digest="new"))
    assert registry.get("a").digest == "a-new"
    assert registry.used_bytes == 20
    registry.release(held)
    assert registry.used_bytes == 10
    registry.remove("a")
    with pytest.raises(AdapterNotFound):
        registry.acquire("a")


def test_a_name_that_is_not_there_is_answered_with_those_that_are() -> None:
    registry = AdapterRegistry(100)
    registry.add(adapter("answerability"))
    with pytest.raises(AdapterNotFound, match="did you mean answerability"):
        registry.get("answerabilty")


@given(
    st.lists(
        st.tuples(st.sampled_from(["add", "acquire", "release", "remove", "pin"]), st.sampled_from("abcd")),
        max_size=40,
    )
)
def test_the_budget_holds_whatever_happens(operations: list[tuple[str, str]]) -> None:
    registry = AdapterRegistry(25)
    held: list[Adapter] = []
    for number, (verb, name) in enumerate(operations):
        try:
            if verb == "add":
                registry.add(adapter(name, digest=str(number)))
            elif verb == "acquire":
                held.append(registry.acquire(name))
            elif verb == "release" and held:
                registry.release(held.pop())
            elif verb == "remove":
                registry.remove(name)
            elif verb == "pin":
                registry.pin(name, number % 2 == 0)
        except AdapterError:
            pass
        registry.check_integrity()
        assert registry.used_bytes <= 25


def test_evicted_adapters_are_told_and_replaced_ones_returned() -> None:
    evicted: list[str] = []
    registry = AdapterRegistry(20, on_evict=lambda gone: evicted.append(gone.digest))
    first = adapter("a", digest="1")
    assert registry.add(first) is None
    assert registry.add(adapter("b")) is None
    assert registry.add(adapter("a", digest="2")) is first
    assert evicted == []
    registry.acquire("a")
    registry.add(adapter("c"))
    registry.remove("c")
    assert evicted == ["b-d"]


def test_the_same_adapter_again_is_kept_and_its_uses_with_it() -> None:
    registry = AdapterRegistry(10)
    first = adapter("a")
    registry.add(first, pin=True)
    held = registry.acquire("a")
    assert registry.add(adapter("a")) is None
    assert registry.get("a") is first
    assert registry.infos()[0].pinned
    assert registry.used_bytes == 10
    registry.release(held)


def test_one_that_cannot_fit_changes_nothing() -> None:
    evicted: list[Adapter] = []
    registry = AdapterRegistry(30, on_evict=evicted.append)
    registry.add(adapter("a"))
    registry.add(adapter("b", digest="old"), pin=True)
    with pytest.raises(AdapterError, match="needs 40 bytes; of the budget of 30 only 20 can be freed"):
        registry.add(adapter("c", size=40))
    held = registry.acquire("b")
    with pytest.raises(AdapterError, match="needs 25 bytes"):
        registry.add(adapter("b", size=25, digest="new"))
    assert names(registry) == ["a", "b"]
    assert registry.get("b") is held
    assert evicted == []
    registry.check_integrity()


def test_one_that_was_removed_while_in_use_can_come_back() -> None:
    registry = AdapterRegistry(10)
    only = adapter("a")
    registry.add(only)
    held = registry.acquire("a")
    registry.remove("a")
    with pytest.raises(AdapterError, match="only 0 can be freed"):
        registry.add(adapter("b"))
    registry.add(only)
    assert registry.used_bytes == 10
    registry.release(held)
    with pytest.raises(RuntimeError, match="more often than acquired"):
        registry.release(held)
    registry.check_integrity()


def test_unknown_names_are_not_found_by_any_verb() -> None:
    registry = AdapterRegistry(10)
    for verb in (registry.get, registry.acquire, registry.remove, registry.pin):
        with pytest.raises(AdapterNotFound, match="loaded: none"):
            verb("ghost")
