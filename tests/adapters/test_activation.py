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


@pytest.mark.parametrize(
    ("tokens", "invocation", "start"),
    [
        ([1, 1, 1, 2], [1, 1, 2], 1),
        ([1, 2, 1, 2, 1], [1, 2, 1], 2),
        ([7, 8, 3, 7, 8, 4], [7, 8], 3),
        ([7, 8], [7, 8], 0),
        ([7], [7, 8], None),
        ([], [7], None),
    ],
)
def test_the_last_occurrence_counts_also_after_a_partial_match(
    tokens: list[int], invocation: list[int], start: int | None
) -> None:
    assert find_last(tokens, invocation) == start
    if start is not None:
        assert activation_index(tokens, invocation) == start


def test_the_search_reads_each_token_about_twice_at_most() -> None:
    class Counted(list[int]):
        reads = 0

        def __getitem__(self, index: object) -> int:  # type: ignore[override]
            Counted.reads += 1
            return super().__getitem__(index)  # type: ignore[index]

    tokens = Counted([1] * 5000)
    assert find_last(tokens, [2] + [1] * 200) is None
    assert Counted.reads < 4 * len(tokens)


def test_an_invocation_merged_with_a_newline_shows_the_tokens_there() -> None:
    text = {1: "<certain", 2: "ty", 3: ">", 4: ">\n", 9: "Hi"}
    with pytest.raises(InvocationError) as caught:
        activation_index([9, 9, 1, 2, 4], [1, 2, 3], describe=lambda ids: "".join(text[i] for i in ids))
    assert "[1, 2, 3] ('<certainty>')" in str(caught.value)
    assert "at token 2, it has [1, 2, 4] ('<certainty>\\n')" in str(caught.value)


def test_where_nothing_of_the_invocation_is_there_the_end_of_the_prompt_is_shown() -> None:
    with pytest.raises(InvocationError, match=r"prompt of 6 tokens lacks; it ends with \[6, 7, 8, 9\]"):
        activation_index([4, 5, 6, 7, 8, 9], [1, 2], adapter="guard")
