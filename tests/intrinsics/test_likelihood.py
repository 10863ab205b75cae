"""Likelihoods, to the last bit those of granite-common 0.4.1, and what it cannot read."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import pytest

from midstream.errors import OutputError
from midstream.intrinsics import Contract, process_reply
from midstream.intrinsics.likelihood import LikelihoodReader, token_starts
from midstream.intrinsics.literals import literals
from midstream.types import TokenLogprob
from tests.intrinsics.reference import (
    both_refuse,
    config,
    ours,
    processed,
    processed_by_reference,
    random_tokens,
    reply_of,
    token,
)

LABELS: dict[str, dict[Any, Any]] = {
    "words": {"answerable": 1.0, "unanswerable": 0.0},
    "shared start": {"yes": 0.9, "yesterday": 0.2, "no": 0.1},
    "whole values": {"high": 1, "low": 0},
    "digits": {k: (k + 0.5) / 10 for k in range(10)},
    "numbers": {10: 0.1, 100: 0.7, -3: 0.2},
    "truth": {True: 1.0, False: 0.0},
    "mixed": {"none": 0.25, 1: 0.5, False: 0.75},
    "letters": {"größer": 0.8, "kleiner": 0.3, 'a"b': 0.5},
}
SHAPES = ("{}", '{{"score": {}}}', '[{{"a": {}, "b": "x y"}}, {{"a": {}, "b": "1, 2"}}]', '{{"l": [{}, {}, {}]}}')
PATHS: dict[str, list[Any]] = {SHAPES[0]: [], SHAPES[1]: ["score"], SHAPES[2]: [None, "a"], SHAPES[3]: ["l", None]}


def likelihood(path: list[Any], categories: dict[Any, Any]) -> dict[str, Any]:
    return {"type": "likelihood", "input_path": path, "categories_to_values": categories}


def case(labels: str, shape: str, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """A contract, and a reply whose tokens begin with each label but are cut at random elsewhere."""
    random = Random(f"{labels}{shape}{seed}")
    categories = LABELS[labels]
    chosen = [json.dumps(random.choice(list(categories)), ensure_ascii=False) for _ in range(shape.count("{}"))]
    text = shape.format(*chosen)
    path = PATHS[shape]
    starts = [p.begin + isinstance(p.value, str) for p in literals(text).values()]
    names = [*map(str, categories), "true", "false"]
    fields = config(transformations=[likelihood(path, categories)])
    return fields, reply_of(text, random_tokens(text, starts, names, random))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("labels", LABELS)
def test_expectations_have_the_same_bits(labels: str, shape: str, seed: int) -> None:
    fields, reply = case(labels, shape, seed)
    found = processed(fields, reply)
    assert found != json.loads(reply["choices"][0]["message"]["content"]) or labels == "truth"


@pytest.mark.parametrize("seed", range(40))
def test_a_label_anywhere_in_the_tokens_is_read_or_refused_alike(seed: int) -> None:
    random = Random(seed)
    labels = random.choice(list(LABELS))
    text = f'{{"score": {json.dumps(random.choice(list(LABELS[labels])), ensure_ascii=False)}}}'
    fields = config(transformations=[likelihood(["score"], LABELS[labels])])
    reply = reply_of(text, random_tokens(text, (), list(map(str, LABELS[labels])), random))
    try:
        processed_by_reference(fields, reply)
    except Exception:
        assert "likelihood" in both_refuse(fields, reply)
    else:
        processed(fields, reply)


@pytest.mark.parametrize(
    ("tokens", "categories", "expected"),
    [
        ([token("yes", -0.5, no=-1.0)], {"yes": 1.0}, 1.0),
        ([token("yes", -0.5, maybe=-1.0)], {"no": 1.0}, 0.0),  # no category matches
        ([token('"yes"')], {"yes": 1}, 1),  # the label is the end of a longer token: its value as it is
        ([token('"'), token("y", -0.5, n=-1.0), token('es"')], {"yes": 1.0, "no": 0.0}, None),
        ([token('"'), token("yes", -0.2, **{"": -1.0}), token('"')], {"no": 0.5, "yes": 1.0}, None),
    ],
)
def test_small_cases(tokens: list[Any], categories: dict[Any, Any], expected: float | None) -> None:
    text = '"yes"'
    if tokens[0]["token"] == "yes":
        tokens = [token('"'), *tokens, token('"')]
    found = processed(config(transformations=[likelihood([], categories)]), reply_of(text, tokens))
    assert expected is None or json.dumps(found) == json.dumps(expected)


def test_truth_values_count_only_when_chosen() -> None:
    """`true` begins no category, since Python writes it `True`: the reference's rule, kept so that floats agree."""
    categories = {True: 0.8, False: 0.1}
    tokens = [token('{"a": '), token("true", -0.7, false=-0.8), token("}")]
    assert (
        processed(config(transformations=[likelihood(["a"], categories)]), reply_of('{"a": true}', tokens))["a"] == 0.8
    )


def test_a_second_likelihood_at_one_place_is_refused() -> None:
    rule = likelihood(["a"], {"x": 0.5})
    tokens = [token('{"a": "'), token("x"), token('"}')]
    reason = both_refuse(config(transformations=[rule, rule]), reply_of('{"a": "x"}', tokens))
    assert "transformation 1 (likelihood) cannot be carried out at ['a']" in reason
    assert "the value there is 0.5" in reason


@pytest.mark.parametrize(
    ("text", "tokens", "path", "reason"),
    [
        ('{"a": "x"}', None, ["a"], "without logprobs"),
        ('{"a": {"b": "x"}}', [token('{"a": {"b": "x"}}')], ["a"], "so it has no tokens"),
        ('{"a": "x"}', [token('{"a": "x'), token('"}')], ["a"], "no token begins at character 7"),
        ('{"a": "y"}', [token('{"a": "y"'), token("}")], ["a"], "none of the categories"),
        ('{"a": "x"}', [token('{"a": "'), token("x", -1e9), token('"}')], ["a"], "all categories are zero"),
    ],
)
def test_what_cannot_be_read_is_refused_by_both(text: str, tokens: Any, path: list[Any], reason: str) -> None:
    fields = config(transformations=[likelihood(path, {"x": 0.5})])
    assert reason in both_refuse(fields, reply_of(text, tokens))


# ---------------------------------------------------------------------- otherwise than the reference


def test_null_beside_the_label_is_no_obstacle() -> None:
    """The reference cannot hold the position of null and refuses the whole output."""
    fields = config(transformations=[likelihood(["b"], {"x": 0.5})])
    reply = reply_of('{"a": null, "b": "x"}', [token('{"a": null, "b": "'), token("x"), token('"}')])
    with pytest.raises(ValueError):
        processed_by_reference(fields, reply)
    assert ours(fields, reply) == {"a": None, "b": 0.5}


def test_digits_and_marks_in_the_first_string_are_no_obstacle() -> None:
    """The reference takes digits and commas in an output's first string for tokens of JSON."""
    fields = config(transformations=[likelihood([0, "a1, true"], {"x": 0.5})])
    reply = reply_of('[{"a1, true": "x"}]', [token('[{"a1, true": "'), token("x"), token('"}]')])
    with pytest.raises(ValueError):
        processed_by_reference(fields, reply)
    assert ours(fields, reply) == [{"a1, true": 0.5}]


def test_null_may_be_what_a_label_was_weighed_against() -> None:
    """The reference cannot read such an output; here null has no value, and its alternatives share all there is."""
    fields = config(transformations=[likelihood([None], {"x": 0.5})])
    reply = reply_of('[null, "x"]', [token("["), token("null", -0.1, x=-0.2), token(', "'), token("x"), token('"]')])
    with pytest.raises(ValueError):
        processed_by_reference(fields, reply)
    assert ours(fields, reply) == [0.5, 0.5]


def test_parts_of_a_character_do_not_shift_the_labels() -> None:
    """The reference counts a character once for each of its tokens, and looks behind the label."""
    text = '{"a": "日🙂 b", "s": "x"}'
    pieces = ['{"a', '": "', "�", "�", "�", "�", "�", " b", '", "', 's": "', "x", '"}', "<end>"]
    tokens = [token(piece, -0.5, **({"y": -0.5} if piece == "x" else {})) for piece in pieces]
    fields = config(transformations=[likelihood(["s"], {"x": 1.0, "y": 0.0})])
    with pytest.raises(Exception):  # noqa: B017 whatever Python raises there
        processed_by_reference(fields, reply_of(text, tokens))
    assert ours(fields, reply_of(text, tokens))["s"] == 0.5


def test_tokens_of_another_text_are_refused() -> None:
    """The reference would read whatever stands at the label's place."""
    fields = config(transformations=[likelihood(["s"], {"x": 1.0})])
    with pytest.raises(OutputError, match="not those of the text"):
        process_reply(
            Contract.model_validate(fields), reply_of('{"s": "x"}', [token('{"t": "'), token("x"), token('"}')])
        )


# ---------------------------------------------------------------------- parts


@pytest.mark.parametrize(
    ("text", "pieces", "starts"),
    [
        ("abc", ["a", "bc"], {0: 0, 1: 1}),
        ("abc", ["a", "", "bc", "<end>"], {0: 0, 1: 2}),
        ("ab", ["a", "bcd"], {0: 0, 1: 1}),  # cut at a stop string
        ("a日b", ["a", "�", "�", "b"], {0: 0, 1: 1, 2: 3}),
        ("a 日本b", ["a", " �", "�", "本", "b"], {0: 0, 1: 1, 3: 3, 4: 4}),
        ("�b", ["�", "b"], {0: 0, 1: 1}),  # the character itself
        ("日", ["�", "�"], {0: 0}),
        ("", ["a"], {}),
    ],
)
def test_where_tokens_begin(text: str, pieces: list[str], starts: dict[int, int]) -> None:
    assert token_starts(text, [TokenLogprob(0, 0.0, piece) for piece in pieces]) == starts


@pytest.mark.parametrize("pieces", [["b"], ["a", "x"], ["a", "�", "z"]])
def test_tokens_that_are_not_the_text_s(pieces: list[str]) -> None:
    with pytest.raises(ValueError, match="not those of the text"):
        token_starts("ab日c", [TokenLogprob(0, 0.0, piece) for piece in pieces])


def test_a_forced_token_is_certain() -> None:
    reader = LikelihoodReader('"x"', [TokenLogprob(1, 0.0, '"'), TokenLogprob(2, 0.0, "x"), TokenLogprob(3, 0.0, '"')])
    assert reader.expectation("x", (), {"x": 0.25, "y": 1.0}) == 0.25
