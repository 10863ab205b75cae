from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from midstream.adapters.activation import activation_index, find_last
from midstream.errors import InvocationError

SMALL = st.lists(st.integers(0, 2), max_size=30)


@given(SMALL, st.lists(st.integers(0, 2), min_size=1, max_size=5))
def test_it_finds_what_a_naive_search_finds(tokens: list[int], invocation: list[int]) -> None:
    width = len(invocation)
    starts = [i for i in range(len(tokens) - width + 1) if tokens[i : i + width] == invocation]
    assert find_last(tokens, invocation) == (starts[-1] if starts else None)


def test_the_error_names_the_adapter_the_invocation_and_the_nearest_place() -> None:
    with pytest.raises(InvocationError) as caught:
        activation_index([5, 1, 2, 9, 4], [1, 2, 3], describe=lambda ids: "|".join(map(str, ids)), adapter="guard")
    text = str(caught.value)
    assert "guard" in text
    assert "[1, 2, 3] ('1|2|3')" in text
    assert "at token 1" in text


def test_an_empty_invocation_is_never_found() -> None:
    assert find_last([1, 2], []) is None
