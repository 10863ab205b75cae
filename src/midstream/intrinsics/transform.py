"""The transformations of a contract, carried out in order on an answer's JSON."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from midstream.errors import InputError, OutputError
from midstream.intrinsics import records
from midstream.intrinsics.channel import final_channel
from midstream.intrinsics.likelihood import LikelihoodReader
from midstream.intrinsics.literals import Path, fetch, matching, replace
from midstream.intrinsics.sentences import Sentence, Tagged, untag, untag_passages
from midstream.intrinsics.spec import (
    Contract,
    DecodeSentences,
    DropDuplicates,
    Explode,
    Likelihood,
    MergeSpans,
    Nest,
    Project,
    Transformation,
)
from midstream.types import TokenLogprob

Operation = Callable[[Any, Path], Any]

_FAULTS = (ValueError, TypeError, LookupError, ArithmeticError, RecursionError)


@dataclass(frozen=True, slots=True)
class Answer:
    """What transformations read beside the JSON: its text, its tokens' logprobs, and what the request had tagged."""

    text: str
    tokens: Sequence[TokenLogprob] | None = None
    tagged: Tagged | None = None


def read_answer(
    contract: Contract, text: str, tokens: Sequence[TokenLogprob] | None, tagged: Tagged | None = None
) -> Answer:
    """The answer in a model's output; with the contract's logprobs_workaround, that of its last final channel."""
    if contract.logprobs_workaround and tokens is not None:
        found = final_channel(tokens)
        if found:
            text, tokens = "".join(token.text for token in found), found
    return Answer(text, tokens, tagged)


def transform(value: Any, contract: Contract, answer: Answer) -> Any:
    """The answer's JSON value after all transformations; `value` itself stays as it is.

    Raises OutputError that names the transformation, the path and the value there, and InputError when sentences are
    to be found and the request is not given.
    """
    value = copy.deepcopy(value)
    for index, rule in enumerate(contract.transformations or ()):
        value = _apply(rule, index, value, contract, answer)
    return value


def _apply(rule: Transformation, index: int, value: Any, contract: Contract, answer: Answer) -> Any:
    place: list[str | int | None] = list(rule.input_path)
    put = _put_beside if isinstance(rule, DecodeSentences) else replace
    there = value
    try:
        paths = matching(value, rule.input_path)
        operation = _operation(rule, contract, answer)
        for path in paths:
            place, there = list(path), fetch(value, path)
            value = put(value, path, operation(there, path))
    except _FAULTS as error:
        what = f"transformation {index} ({rule.type}) cannot be carried out at {place}"
        raise OutputError(f"{what}: {error}; the value there is {short(there)}") from error
    return value


def _operation(rule: Transformation, contract: Contract, answer: Answer) -> Operation:
    """What a transformation makes of the value at a path."""
    if isinstance(rule, Nest):
        return lambda value, _: {rule.field_name: value}
    if isinstance(rule, Project):
        return lambda value, _: records.project(value, rule.names)
    if isinstance(rule, Explode):
        return lambda value, _: records.explode(value, rule.target_field)
    if isinstance(rule, DropDuplicates):
        return lambda value, _: records.drop_duplicates(value, rule.target_fields)
    if isinstance(rule, MergeSpans):
        return lambda value, _: records.merge_spans(value, rule)
    if isinstance(rule, Likelihood):
        return _likelihood(rule, answer)
    return _decode_sentences(rule, contract, answer)


def _likelihood(rule: Likelihood, answer: Answer) -> Operation:
    if answer.tokens is None:
        raise ValueError("the answer came without logprobs")
    reader = LikelihoodReader(answer.text, answer.tokens)
    return lambda value, path: reader.expectation(value, path, rule.categories_to_values)


def _decode_sentences(rule: DecodeSentences, contract: Contract, answer: Answer) -> Operation:
    if answer.tagged is None:
        raise InputError("decode_sentences needs the request that was answered")
    prefix = (contract.sentence_boundaries or {})[rule.source]
    if rule.source == "documents":
        sentences = untag_passages(answer.tagged.documents, prefix)
    else:
        sentences = untag(answer.tagged.last_message, prefix)
    return lambda value, _: _fields_of(_numbered(value, sentences), rule)


def _numbered(value: Any, sentences: Sequence[Sentence]) -> Sentence:
    if type(value) is not int:
        raise TypeError("it is not the number of a sentence")
    if not 0 <= value < len(sentences):
        raise IndexError(f"there are {len(sentences)} sentences, numbered from 0")
    return sentences[value]


def _fields_of(sentence: Sentence, rule: DecodeSentences) -> dict[str, Any]:
    found = {"begin": sentence.begin, "end": sentence.end, "text": sentence.text, "document_id": sentence.document_id}
    names: Mapping[Any, str | None] = rule.output_names
    return {name: each for part, each in found.items() if (name := names.get(part)) is not None}


def _put_beside(value: Any, path: Path, fields: dict[str, Any]) -> Any:
    """With further fields in the object that has the one at `path`."""
    parent = fetch(value, path[:-1]) if path else None
    if not isinstance(parent, dict):
        raise TypeError("it is not the field of an object, so nothing can stand beside it")
    return replace(value, path[:-1], {**parent, **fields})


def short(value: Any) -> str:
    """A value as a message shows it."""
    shown = repr(value)
    return shown if len(shown) <= 300 else f"{shown[:300]}…"
