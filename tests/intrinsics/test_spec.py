"""Contracts: what they may say, what they ask for, and what is wrong with them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from midstream.errors import ContractError
from midstream.intrinsics import Contract, constraint_of_schema, load_contract
from midstream.intrinsics.render import sampling_params
from midstream.types import AdapterInfo, Choice, JsonSchema
from tests.intrinsics.reference import config

LIKELIHOOD = {"type": "likelihood", "input_path": [], "categories_to_values": {"a": 1}}
DECODE = {"type": "decode_sentences", "input_path": ["n"], "source": "documents", "output_names": {"text": "t"}}
MERGE = {"type": "merge_spans", "input_path": [], "group_fields": [], "begin_field": "b", "end_field": "e"}


def load(fields: dict[str, Any]) -> Contract:
    text = yaml.safe_dump(fields, sort_keys=False)
    return load_contract(AdapterInfo("check", "alora", "d", "/adapters/check", (7,), "<c>", 4, 10, contract=text))


@pytest.mark.parametrize(
    "fields",
    [
        config(),
        config(transformations=[]),
        config(transformations=[LIKELIHOOD, MERGE, {"type": "nest", "input_path": ["a", None, 0], "field_name": "n"}]),
        config(transformations=[DECODE], sentence_boundaries={"documents": "c"}, docs_as_message="roles"),
        config(response_format={"type": "object"}, name="x", logprobs_workaround="gpt-oss"),
        config(docs_as_message="", sentence_boundaries={}, logprobs_workaround=None, parameters={}, instruction=None),
        config(parameters={"extra_body": {"top_k": 1}}, instruction="{{}} {a.b} {c[0]} {d:{width}}"),
    ],
)
def test_contracts_of_the_format_are_read(fields: dict[str, Any]) -> None:
    assert load(fields).model == "base"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"transformations": [{"type": "shuffle", "input_path": []}]}, "transformations.0: Input tag 'shuffle'"),
        ({"transformations": [{"input_path": []}]}, "transformations.0: Unable to extract tag"),
        (
            {"transformations": [{"type": "nest", "field_name": "n"}]},
            "transformations.0.nest.input_path: Field required",
        ),
        ({"transformations": [{**LIKELIHOOD, "top": 3}]}, "likelihood.top: Extra inputs"),
        ({"transformations": [{**LIKELIHOOD, "input_path": [True]}]}, "likelihood.input_path.0"),
        ({"transformations": [{**LIKELIHOOD, "input_path": [1.5]}]}, "likelihood.input_path.0"),
        ({"transformations": [{**LIKELIHOOD, "categories_to_values": {"a": "b"}}]}, "categories_to_values.a"),
        ({"transformations": [{**LIKELIHOOD, "categories_to_values": {"a": True}}]}, "categories_to_values.a"),
        ({"transformations": [{**MERGE, "group_fields": "b"}]}, "merge_spans.group_fields"),
        ({"transformations": [{"type": "project", "input_path": [], "retained_fields": "a"}]}, "retained_fields"),
        ({"transformations": [DECODE]}, "decode_sentences: sentence_boundaries does not tag the documents"),
        (
            {"transformations": [DECODE], "sentence_boundaries": {"last_message": "c"}},
            "sentence_boundaries does not tag the documents",
        ),
        (
            {"transformations": [DECODE], "sentence_boundaries": {"documents": "c"}, "docs_as_message": "string"},
            "with docs_as_message string",
        ),
        (
            {"transformations": [{**DECODE, "source": "last_message", "output_names": {"document_id": "d"}}]},
            "document_id, which only sentences of documents have",
        ),
        ({"transformations": [{**DECODE, "output_names": {"title": "d"}}]}, "output_names.title"),
        ({"transformations": [{**DECODE, "source": "first"}]}, "decode_sentences.source"),
        ({"sentence_boundaries": {"first": "c"}}, "sentence_boundaries.first"),
        ({"sentence_boundaries": {"documents": None}}, "sentence_boundaries.documents"),
        ({"docs_as_message": "xml"}, "docs_as_message: Input should be 'string', 'json' or 'roles'"),
        ({"parameters": [1]}, "parameters"),
        ({"parameters": {"extra_body": None}}, "extra_body is not a mapping"),
        ({"instruction": "{a"}, "instruction: "),
        ({"instruction": "{} {0}"}, "cannot be filled"),
        ({"response_format": "true"}, "response_format is not a JSON object"),
        ({"response_format": 3}, "response_format: "),
        ({"response_format": {"type": 3}}, "not a JSON schema"),
        ({"labels": ["a"], "model": 3}, "model: .*labels: "),
    ],
)
def test_what_is_wrong_is_named_with_the_file(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ContractError, match=reason) as caught:
        load(config(**fields))
    assert "/adapters/check/io.yaml" in str(caught.value)


def test_what_a_contract_asks_for() -> None:
    assert load(config(transformations=[LIKELIHOOD])).needs_logprobs
    assert not Contract(transformations=None).needs_logprobs
    assert Contract(instruction="{a.b} {c[0]} {d:{width}} {last_message} {{x}}").arguments == {"a", "c", "d", "width"}
    assert not Contract().needs_messages
    assert Contract(instruction="").needs_messages
    assert Contract().rewrites is None
    assert Contract(sentence_boundaries={"last_message": "r"}).rewrites == "sentence tags in the last message"
    both = Contract(sentence_boundaries={"documents": "c", "last_message": "r"}, docs_as_message="json")
    assert both.rewrites == "sentence tags in the last message and the documents; documents as messages at the start"
    assert both.needs_messages
    kwargs = Contract(parameters={"extra_body": {"chat_template_kwargs": {"a": 1}}})
    assert kwargs.rewrites == "arguments of its own for the chat template"
    assert kwargs.template_arguments == {"a": 1}


def test_how_its_answers_are_decoded() -> None:
    given = {
        "max_completion_tokens": 4,
        "stop": "x",
        "seed": None,
        "extra_body": {"top_k": 3, "chat_template_kwargs": {}},
    }
    params = sampling_params(load(config(parameters=given)))
    assert (params.max_tokens, params.stop, params.top_k, params.logprobs) == (4, ("x",), 3, False)
    params = sampling_params(load(config(transformations=[LIKELIHOOD], parameters={"logprobs": False})))
    assert (params.logprobs, params.top_logprobs) == (True, 10)
    params = sampling_params(Contract(logprobs_workaround=True))
    assert (params.logprobs, params.top_logprobs) == (True, 0)
    for wrong in ({"beams": 3}, {"temperature": -1}, {"extra_body": {"best_of": 2}}):
        with pytest.raises(ContractError, match=next(iter(wrong.get("extra_body", wrong)))):
            sampling_params(Contract(parameters=wrong))


@pytest.mark.parametrize(
    ("schema", "options"),
    [
        ({"type": "string", "enum": ["ja", "größer"]}, ('"ja"', '"größer"')),
        ({"enum": [3, 1, 3]}, ("3", "1")),
        ({"type": "boolean", "enum": [True, False], "title": "T", "$schema": "x"}, ("true", "false")),
    ],
)
def test_schemas_that_list_their_values_are_choices(schema: dict[str, Any], options: tuple[str, ...]) -> None:
    assert constraint_of_schema(schema) == Choice(options=options)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string"},
        {"enum": []},
        {"enum": "ab"},
        {"enum": [1, True]},
        {"enum": [1, "a"]},
        {"enum": [None]},
        {"type": "integer", "enum": ["a"]},
        {"type": "string", "enum": ["a", "bb"], "maxLength": 1},
        {"type": "object", "properties": {"ä": {"enum": ["x"]}}},
    ],
)
def test_all_others_are_grammars(schema: dict[str, Any]) -> None:
    constraint = constraint_of_schema(schema)
    assert isinstance(constraint, JsonSchema)
    assert json.loads(constraint.schema_text) == schema


def test_a_parsed_response_format_is_kept_as_text() -> None:
    schema = {"type": "object", "properties": {"z": {"type": "null"}, "ä": {"enum": [1]}}}
    contract = load(config(response_format=schema))
    assert contract.response_format == json.dumps(schema, ensure_ascii=False)
    assert contract == Contract.model_validate(config(response_format=json.dumps(schema, ensure_ascii=False)))
