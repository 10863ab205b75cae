"""Sentence numbers decoded as granite-common 0.4.1 decodes them, and where it does not."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import pytest

from midstream.errors import InputError, OutputError
from tests.intrinsics.reference import (
    Config,
    both_refuse,
    config,
    ours,
    processed,
    processed_by_reference,
    reply_of,
    rewritten,
)

TEXTS = [
    "The light is old. It was built in 1752! Was it? Yes.",
    "Only this",
    "日本語です。 Another one here.  And, after two spaces, one more.",
    "Mr. Hale wrote it. “So he did.” Then he left.\n\nA new line. The end.",
]
NAMES: list[dict[str, Any]] = [
    {"begin": "b", "end": "e", "text": "t"},
    {"text": "said"},
    {"end": "number", "begin": "z"},
    {"begin": None, "text": "number"},
]


def decode(source: str, path: list[Any], names: dict[str, Any]) -> dict[str, Any]:
    return {"type": "decode_sentences", "source": source, "input_path": path, "output_names": names}


def request_of(fields: Config, random: Random) -> Any:
    documents = [{"doc_id": str(i), "text": text} for i, text in enumerate(random.sample(TEXTS, 3))]
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": random.choice(TEXTS)}]
    return rewritten(fields, {"messages": messages, "extra_body": {"documents": documents}})


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("instruction", [None, "Which sentences? {last_message}"])
@pytest.mark.parametrize("form", [None, "json", "roles"])
@pytest.mark.parametrize("source", ["last_message", "documents"])
def test_decode_sentences(source: str, form: str | None, instruction: str | None, seed: int) -> None:
    random = Random(seed)
    names = random.choice(NAMES)
    if source == "documents":
        names = random.choice([names, {**names, "document_id": "doc"}])
    fields = config(
        transformations=[decode(source, [None, "number"], names)],
        sentence_boundaries={"documents": "c", "last_message": "r"},
        docs_as_message=form,
        instruction=instruction,
    )
    request = request_of(fields, random)
    count = 1 if source == "last_message" else 4
    value = [{"number": random.randrange(count), "x": "y"}, {"number": 0}]
    found = processed(fields, reply_of(json.dumps(value)), request)
    assert found != value
    assert all(name in record for record in found for name in names.values() if name)


def test_decode_sentences_tells_where_each_stands() -> None:
    fields = config(
        transformations=[decode("documents", ["n"], {"begin": "b", "end": "e", "text": "t", "document_id": "d"})],
        sentence_boundaries={"documents": "c"},
    )
    request = rewritten(
        fields,
        {
            "messages": [{"role": "user", "content": "x"}],
            "extra_body": {"documents": [{"doc_id": "one", "text": "It stands.  It shines."}, {"text": "Alone."}]},
        },
    )
    expected = [(0, 11, "It stands. ", "one"), (11, 21, "It shines.", "one"), (0, 6, "Alone.", None)]
    for number, (begin, end, text, name) in enumerate(expected):
        found = processed(fields, reply_of(f'{{"n": {number}}}'), request)
        assert found == {"n": number, "b": begin, "e": end, "t": text, "d": name}


def test_one_after_the_other() -> None:
    """As a contract for citations has them: numbers to sentences, one record each, fields, whole spans."""
    rules = [
        {"type": "explode", "input_path": [], "target_field": "c"},
        decode("last_message", [None, "r"], {"begin": "rb", "end": "re", "text": "rt"}),
        decode("documents", [None, "c"], {"begin": "cb", "end": "ce", "text": "ct", "document_id": "doc"}),
        {
            "type": "project",
            "input_path": [],
            "retained_fields": {k: k for k in ("rb", "re", "rt", "cb", "ce", "ct", "doc")},
        },
        {
            "type": "merge_spans",
            "input_path": [],
            "group_fields": ["rb", "re", "rt", "doc"],
            "begin_field": "cb",
            "end_field": "ce",
            "text_field": "ct",
        },
        {"type": "nest", "input_path": [], "field_name": "citations"},
    ]
    fields = config(transformations=rules, sentence_boundaries={"documents": "c", "last_message": "r"}, instruction="?")
    request = request_of(fields, Random(3))
    found = processed(fields, reply_of('[{"r": 0, "c": [1, 0, 3]}, {"r": 0, "c": [4]}]'), request)
    assert 2 <= len(found["citations"]) <= 3


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('[{"n": 1}]', "there are 1 sentences, numbered from 0"),
        ('[{"n": "0"}]', "it is not the number of a sentence"),
        ("[[0]]", None),
    ],
)
def test_sentences_that_are_not_there(content: str, reason: str | None) -> None:
    path = [None, "n"] if reason else [None, None]
    fields = config(
        transformations=[decode("last_message", path, {"text": "t"})], sentence_boundaries={"last_message": "c"}
    )
    request = rewritten(fields, {"messages": [{"role": "user", "content": "One."}], "extra_body": {}})
    assert (reason or "not the field of an object") in both_refuse(fields, reply_of(content), request)


def test_sentences_need_the_request_with_its_tags() -> None:
    fields = config(
        transformations=[decode("last_message", ["n"], {"text": "t"})], sentence_boundaries={"last_message": "c"}
    )
    both_refuse(fields, reply_of('{"n": 0}'))
    with pytest.raises(InputError, match="needs the request"):
        ours(fields, reply_of('{"n": 0}'))
    untagged = {"messages": [{"role": "user", "content": "One."}]}
    assert "no sentence tag '<c0> ' in 'One.'" in both_refuse(fields, reply_of('{"n": 0}'), untagged)
    only = {**fields, "instruction": "x"}
    with pytest.raises(InputError, match="no message before the instruction"):
        ours(only, reply_of('{"n": 0}'), untagged)
    moved = {**fields, "docs_as_message": "json"}
    with pytest.raises(InputError, match="not the documents as JSON"):
        ours(moved, reply_of('{"n": 0}'), untagged)


# ---------------------------------------------------------------------- otherwise than the reference


@pytest.mark.parametrize("number", [-1, True])
def test_sentences_are_counted_from_the_front(number: Any) -> None:
    """The reference takes -1 for the last sentence and true for the second one."""
    fields = config(
        transformations=[decode("last_message", ["n"], {"text": "t"})], sentence_boundaries={"last_message": "c"}
    )
    request = rewritten(fields, {"messages": [{"role": "user", "content": "One is. Two are."}], "extra_body": {}})
    reply = reply_of(json.dumps({"n": number}))
    processed_by_reference(fields, reply, request)
    with pytest.raises(OutputError, match="sentence"):
        ours(fields, reply, request)


@pytest.mark.parametrize("form", [None, "json"])
def test_an_empty_document_has_no_sentences(form: str | None) -> None:
    """The reference looks for a tag in it and finds none."""
    fields = config(
        transformations=[decode("documents", ["n"], {"text": "t"})],
        sentence_boundaries={"documents": "c"},
        docs_as_message=form,
    )
    documents = [{"text": "One is."}, {"text": ""}, {"text": "Two are."}]
    request = rewritten(
        fields, {"messages": [{"role": "user", "content": "x"}], "extra_body": {"documents": documents}}
    )
    with pytest.raises(ValueError):
        processed_by_reference(fields, reply_of('{"n": 1}'), request)
    assert ours(fields, reply_of('{"n": 1}'), request) == {"n": 1, "t": "Two are."}
