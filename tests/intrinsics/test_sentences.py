"""Sentences, JSON positions and final channels, each against what granite-common 0.4.1 finds."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import pytest
from granite_common.base.types import ChatCompletionLogProbs
from granite_common.intrinsics import json_util
from granite_common.intrinsics.output import _desplit_sentences, _logprobs_workaround

from midstream.intrinsics.channel import final_channel
from midstream.intrinsics.literals import literals, matching, replace
from midstream.intrinsics.sentences import split, tag, untag
from midstream.types import TokenLogprob

WORDS = [
    "The",
    "light",
    "stands.",
    "Dr.",
    "Hale",
    "e.g.",
    "wrote!",
    "Why?",
    "“So.”",
    "1752.",
    "日本。",
    "\n\n",
    "<c1>",
    "...",
]


def prose(random: Random) -> str:
    return " ".join(random.choice(WORDS) for _ in range(random.randint(1, 25)))


@pytest.mark.parametrize("seed", range(40))
def test_tags_are_undone_as_the_reference_undoes_them(seed: int) -> None:
    random = Random(seed)
    texts = [prose(random) for _ in range(3)]
    first = 0
    for text, tagged in zip(texts, tag(texts, "c"), strict=True):
        found = untag(tagged, "c", first, "doc")
        theirs = _desplit_sentences(tagged, "c", first) if tagged else {"begins": [], "ends": [], "texts": []}
        assert [sentence.begin for sentence in found] == theirs["begins"]
        assert [sentence.end for sentence in found] == theirs["ends"]
        assert [sentence.text for sentence in found] == theirs["texts"]
        assert {sentence.document_id for sentence in found} <= {"doc"}
        if "<c" not in text:
            assert "".join(sentence.text for sentence in found) == " ".join(split(text))
        first += len(split(text))


def test_small_cases_of_tags() -> None:
    assert split("One is. Two are?  Three!\n\nFour") == ["One is.", "Two are?", "Three!", "Four"]
    assert tag(["One is. Two are.", "", "Three."], "i") == ["<i0> One is. <i1> Two are.", "", "<i2> Three."]
    assert untag("", "i") == []
    with pytest.raises(ValueError, match="no sentence tag '<i1> '"):
        untag("<i0> One.", "i", 1)


KEYS = ("ä", '"', " 1, {\\")


def json_value(random: Random, depth: int = 0) -> Any:
    kind = random.choice(["list", "object", "scalar"] if depth < 4 else ["scalar"])
    if kind == "list":
        return [json_value(random, depth + 1) for _ in range(random.randint(0, 3))]
    if kind == "object":
        return {f"k{KEYS[i]}": json_value(random, depth + 1) for i in range(random.randint(0, 3))}
    return random.choice([0, -1, 12.5, -3e-7, 1e22, True, False, None, "", "x", 'a"b', "c\\", "1, 2]", "日\n🙂"])


@pytest.mark.parametrize("seed", range(60))
def test_every_literal_is_where_it_stands(seed: int) -> None:
    random = Random(seed)
    value = json_value(random)
    for text in (
        json.dumps(value),
        json.dumps(value, ensure_ascii=False, indent=1),
        json.dumps(value, separators=(",", ":")),
    ):
        found = literals(text)
        assert list(found) == json_util.scalar_paths(value)
        for position in found.values():
            assert json.loads(text[position.begin : position.end]) == position.value
        rebuilt = json.loads(text)
        for path, position in found.items():
            rebuilt = replace(rebuilt, path, position.value)
        assert rebuilt == value


@pytest.mark.parametrize(
    "text",
    ['{"a": [1, "x y", {"b": true}], "c": -1.5e3}', '"x"', "[[[2]], false]", '[{"a": "b"}, {"a": "c: [1,"}]', "7"],
)
def test_positions_are_the_reference_s(text: str) -> None:
    theirs = json_util.reparse_json_with_offsets(text)
    for path, position in literals(text).items():
        other = json_util.fetch_path(theirs, path)
        assert (position.value, position.begin, position.end) == (other.value, other.begin, other.end)


def test_of_a_key_that_comes_twice_the_last_one_counts() -> None:
    assert literals('{"a": 1, "a": 2}')[("a",)].begin == 14


def test_paths_are_found_in_the_order_of_the_text() -> None:
    value = {"b": [{"x": 1}, {"y": 2}, 3], "a": {"x": [4]}}
    assert matching(value, [None, None]) == [("b", 0), ("b", 1), ("b", 2), ("a", "x")]
    assert matching(value, [None, None, "x"]) == [("b", 0, "x")]
    assert matching(value, []) == [()]
    assert matching([True, [5]], [1, 0]) == [(1, 0)]
    assert matching([1], [-1]) == []


C, M, E = "<|channel|>", "<|message|>", "<|end|>"
OUTPUTS = [
    [C, "analysis", M, "hm", E, C, "final", M, '{"a"', ": 1}", E],
    [C, " final", "\n", M, "x"],
    [C, " ", "final ", M, "x", "<|return|>", "y"],
    [C, "final", M, "one", E, C, "final", M, "two", "<|end_of_text|>"],
    [C, "final", M, "one", E, C, "final", "x", M, "two"],
    [C, "final", C, "final", M, "x"],
    ["<|", "channel", "|>", "final", M, "x"],
    [C, "final", M],
    [C, "final", M, E],
    [C, "final"],
    [C],
    ["plain"],
    [],
    [C, "finally", M, "x"],
    [C, "", "final", "", M, "", "x", "<|start|>"],
]


@pytest.mark.parametrize("pieces", OUTPUTS)
def test_the_final_channel_is_the_one_that_the_reference_finds(pieces: list[str]) -> None:
    found = final_channel([TokenLogprob(0, 0.0, piece) for piece in pieces])
    theirs = _logprobs_workaround(ChatCompletionLogProbs(content=[{"token": piece} for piece in pieces]))
    assert [token.text for token in found] == (
        [] if theirs is None else [each.token for each in theirs[1].content or []]
    )
