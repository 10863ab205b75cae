"""Who owns which token, without vLLM."""

from types import SimpleNamespace

import numpy as np
import pytest

from midstream_vllm.ownership import (
    INDEX_FIELD,
    Owner,
    block_keys,
    kept_name,
    owned_tokens,
    owner_of,
    read_kept,
    split_prompt,
)

DIGEST = "ab" * 32
STOCK = [("lora", "mine", "/somewhere/mine")]
SALT = ("cache_salt", "s")


def lora(kind: str) -> SimpleNamespace:
    return SimpleNamespace(lora_path=f"/kept/{kept_name(kind, DIGEST)}")


def params(extra: dict[str, int] | None) -> SimpleNamespace:
    return SimpleNamespace(extra_args=extra)


def test_a_kept_folder_says_kind_and_digest() -> None:
    assert read_kept(f"/a/b/{kept_name('alora', DIGEST)}") == ("alora", DIGEST)
    for path in ("/not/a/real/path", "/a/alora-short", f"/a/other-{DIGEST}", "org/alora-adapter"):
        assert read_kept(path) is None


def test_owners() -> None:
    assert owner_of(None, params(None)) is None
    assert owner_of(SimpleNamespace(lora_path="/not/a/real/path"), params(None)) is None
    assert owner_of(lora("alora"), params({INDEX_FIELD: 7})) == Owner(DIGEST, 7)
    assert owner_of(lora("lora"), params({INDEX_FIELD: 7})) == Owner(DIGEST, 0)  # a caller's own field means nothing
    assert owner_of(lora("lora"), None) == Owner(DIGEST, 0)


@pytest.mark.parametrize("given", [None, params(None), params({"else": 1})])
def test_an_alora_without_its_index_is_never_taken_for_something_else(given: SimpleNamespace | None) -> None:
    with pytest.raises(RuntimeError, match="activation index"):
        owner_of(lora("alora"), given)


@pytest.mark.parametrize(("end", "owned"), [(32, False), (64, False), (65, True), (96, True)])
def test_a_block_carries_its_adapter_only_past_the_activation_index(end: int, owned: bool) -> None:
    found = block_keys((*STOCK, SALT), STOCK, Owner(DIGEST, 64), end)
    assert found == ((("lora", DIGEST), SALT) if owned else (SALT,))


def test_a_block_before_the_activation_has_the_base_models_keys() -> None:
    assert block_keys(tuple(STOCK), STOCK, Owner(DIGEST, 64), 64) is None
    assert block_keys(None, [], None, 64) is None
    assert block_keys((SALT,), [], None, 64) == (SALT,)
    # An older form of the keys is the bare name.
    assert block_keys(("mine",), ["mine"], Owner(DIGEST, 0), 32) == (DIGEST,)


def owned(starts: dict[int, int], computed: list[int], scheduled: list[int]) -> list[list[int]]:
    """Adapter numbers of a step of rows 5, 6, 7, by row."""
    whole = tuple(number for number, count in zip((5, 6, 7), scheduled, strict=True) for _ in range(count))
    found = owned_tokens(whole, np.array(scheduled), np.array(computed), starts)
    assert len(found) == sum(scheduled)
    ends = np.cumsum(scheduled)
    return [list(found[end - count : end]) for end, count in zip(ends, scheduled, strict=True)]


@pytest.mark.parametrize(
    ("start", "computed", "expected"),
    [
        (10, 0, [0, 0, 0, 0]),  # a chunk that ends before the activation
        (4, 0, [0, 0, 0, 0]),  # or right there
        (3, 0, [0, 0, 0, 6]),
        (12, 10, [0, 0, 6, 6]),  # a later chunk
        (10, 10, [6, 6, 6, 6]),
        (9, 10, [6, 6, 6, 6]),  # decoding, or a resumed request's cached prefix
        (0, 0, [6, 6, 6, 6]),
    ],
)
def test_tokens_before_the_activation_are_the_base_models(start: int, computed: int, expected: list[int]) -> None:
    rows = owned({1: start}, [3, computed, 8], [2, 4, 1])
    assert rows == [[5, 5], expected, [7]]


def test_each_row_has_its_own_activation() -> None:
    assert owned({0: 2, 2: 9}, [0, 50, 8], [3, 1, 3]) == [[0, 0, 5], [6], [0, 7, 7]]


def test_nothing_is_made_anew_where_all_rows_are_past_their_activation() -> None:
    whole = (5, 6)
    assert owned_tokens(whole, np.array([1, 1]), np.array([30, 40]), {0: 20, 1: 40}) is whole


@pytest.mark.parametrize(
    ("start", "cached", "expected"),
    [
        (None, 64, (100, 0, 64, 0)),  # the base model
        (0, 64, (0, 100, 0, 64)),  # a plain LoRA
        (90, 64, (90, 10, 64, 0)),
        (70, 96, (70, 30, 70, 26)),  # the second call of an aLoRA with a long invocation
    ],
)
def test_prompt_tokens_by_owner(start: int | None, cached: int, expected: tuple[int, ...]) -> None:
    found = split_prompt(100, cached, start)
    order = [("base", "prompt"), ("adapter", "prompt"), ("base", "cached"), ("adapter", "cached")]
    assert tuple(found[key] for key in order) == expected
