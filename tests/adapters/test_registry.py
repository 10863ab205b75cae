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
