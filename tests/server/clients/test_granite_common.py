"""granite-common rewrites a request by a contract and reads the answer; the server itself finds the same."""

from __future__ import annotations

import json
import math
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from granite_common import IntrinsicsResultProcessor, IntrinsicsRewriter
from openai import OpenAI

from tests.helpers import tiny_llama
from tests.server.clients.serving import LIBRARY, load_adapters, tiny_adapter
from tests.server.running import Running, running
from tests.tiny import tiny_engine

TALK = [
    {"role": "user", "content": "Where is the lamp? And how far can it be seen?"},
    {"role": "assistant", "content": "It stands on the cliff. It can be seen from 26 miles away. Ships steer by it."},
]
DOCUMENTS = [
    {"doc_id": "a", "text": "The lamp stands on the cliff. It was lit in 1752."},
    {"doc_id": "b", "text": "Ships see it from 26 miles away."},
]


def record(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


PAIRS = {
    "type": "array",
    "minItems": 3,
    "maxItems": 3,
    "items": record(
        r={"type": "integer", "minimum": 0, "maximum": 2},
        c={"type": "array", "minItems": 2, "maxItems": 2, "items": {"type": "integer", "minimum": 0, "maximum": 2}},
    ),
}
DECODED: list[dict[str, Any]] = [
    {"type": "explode", "input_path": [], "target_field": "c"},
    {
        "type": "decode_sentences",
        "source": "last_message",
        "input_path": [None, "r"],
        "output_names": {"begin": "response_begin", "end": "response_end", "text": "response_text"},
    },
    {
        "type": "decode_sentences",
        "source": "documents",
        "input_path": [None, "c"],
        "output_names": {"document_id": "doc_id", "begin": "begin", "end": "end", "text": "text"},
    },
    {
        "type": "project",
        "input_path": [],
        "retained_fields": ["response_begin", "response_end", "response_text", "doc_id", "begin", "end", "text"],
    },
]
CITED: dict[str, Any] = {
    "response_format": PAIRS,
    "transformations": DECODED,
    "sentence_boundaries": {"last_message": "r", "documents": "c"},
    "instruction": "Cite.",
    "parameters": {"max_tokens": 200},
}

# Of a random model's likeliest tokens only some are letters, so there are many labels, one for each letter.
SCORES = {f"{letter}es": index / 51 for index, letter in enumerate(string.ascii_letters)}

# By name; each is a contract but for its `model`.
CONTRACTS: dict[str, dict[str, Any]] = {
    "checked": {
        "response_format": record(requirement_check=record(score={"type": "string", "enum": list(SCORES)})),
        "transformations": [
            {
                "type": "likelihood",
                "input_path": ["requirement_check", "score"],
                "categories_to_values": SCORES,
            }
        ],
        "instruction": "Requirement: {requirement}\nThe answer was: {last_message}",
        "parameters": {"max_completion_tokens": 60, "temperature": 0.0},
    },
    "graded": {
        "response_format": {"type": "string", "enum": list(SCORES)},
        "transformations": [
            {"type": "likelihood", "input_path": [], "categories_to_values": SCORES},
            {"type": "nest", "input_path": [], "field_name": "certainty"},
        ],
        "parameters": {"max_tokens": 5},
    },
    "cited": CITED,
    "cited-json": {**CITED, "docs_as_message": "json"},
    "cited-roles": {**CITED, "docs_as_message": "roles"},
    "free": {
        "response_format": {"type": "string", "enum": ["clear", "unclear"]},
        "docs_as_message": "string",
        "parameters": {"max_tokens": 12},
    },
}
# By name, of those that take any.
ARGUMENTS = {name: {"requirement": "be short"} for name in ("checked", "requirement_check", "requirement-check")}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("contracts")
    return {
        name: tiny_adapter(root, name, seed=seed, **contract) for seed, (name, contract) in enumerate(CONTRACTS.items())
    }


@pytest.fixture(scope="module")
def server(folders: dict[str, Path]) -> Iterator[Running]:
    engine = tiny_engine(tiny_llama())
    load_adapters(engine, folders)
    with running(engine) as server:
        yield server


def through_granite(server: Running, path: Path, name: str, talk: list[Any], documents: list[Any]) -> Any:
    """The result of an intrinsic, with all but the completion itself done by granite-common."""
    request = {"messages": talk, "model": "unused", "extra_body": {"documents": documents}}
    rewriter = IntrinsicsRewriter(config_file=path, model_name=name)
    rewritten = rewriter.transform(json.dumps(request), **ARGUMENTS.get(name, {}))
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        response = client.chat.completions.create(**rewritten.model_dump())
    assert response.model == name
    processed = IntrinsicsResultProcessor(config_file=path).transform(response, rewritten)
    return json.loads(processed.choices[0].message.content)


def through_the_server(server: Running, name: str, talk: list[Any], documents: list[Any]) -> Any:
    """Its own result, found after granite-common's, so of its prompt only the last token is computed again."""
    body = {"messages": talk, "documents": documents, "arguments": ARGUMENTS.get(name, {})}
    response = server.client.post(f"/v1/intrinsics/{name}", json=body)
    assert response.status_code == 200, response.text
    assert response.json()["usage"]["computed_tokens"] == 1, "both prompts are the same"
    return response.json()["result"]


def same(one: Any, other: Any) -> bool:
    """Equal, but for the last digits of fractions."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, abs_tol=1e-4)
    return type(one) is type(other) and bool(one == other)


@pytest.mark.parametrize("name", CONTRACTS)
def test_both_find_the_same(server: Running, folders: dict[str, Path], name: str) -> None:
    theirs = through_granite(server, folders[name] / "io.yaml", name, TALK, DOCUMENTS)
    ours = through_the_server(server, name, TALK, DOCUMENTS)
    assert same(ours, theirs), (ours, theirs)


@pytest.mark.parametrize(
    "name", ["jailbreak", "requirement_check", "requirement-check", "uncertainty", "answerability"]
)
def test_both_find_the_same_with_trained_adapters(trained: Running, switch: Path, name: str) -> None:
    """With the library's own contracts, and with those of `switch`, whose answers are changed."""
    folder = switch / "io_configs" / name
    path = (folder if folder.is_dir() else LIBRARY / name) / "io.yaml"
    asks = name in ("jailbreak", "answerability")
    talk, documents = (TALK[:1], DOCUMENTS) if asks else (TALK, [])
    theirs = through_granite(trained, path, name, talk, documents)
    ours = through_the_server(trained, name, talk, documents)
    assert same(ours, theirs), (ours, theirs)
