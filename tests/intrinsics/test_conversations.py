"""Contracts on conversations that hold token ids, through a real engine."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from midstream.errors import InputError
from midstream.evaluation.run import task_of
from midstream.session import Conversation, Engine
from midstream.types import Document
from tests.helpers import SEVEN, make_adapter_folder, tiny_llama
from tests.intrinsics.reference import config
from tests.tiny import tiny_chat, tiny_engine

LABELS = '{"type": "string", "enum": ["yes", "no"]}'
SCORE = {"type": "likelihood", "input_path": [], "categories_to_values": {"yes": 1.0, "no": 0.0}}
CONTRACTS: dict[str, dict[str, Any]] = {
    "plain": config(response_format=LABELS),
    "score": config(response_format=LABELS, transformations=[SCORE]),
    "tags": config(response_format=LABELS, sentence_boundaries={"documents": "c", "last_message": "r"}),
    "moved": config(response_format=LABELS, docs_as_message="string", instruction="Well?"),
}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    model = tiny_llama()
    with Engine(tiny_engine(model)) as engine:
        for name, contract in CONTRACTS.items():
            load(engine, model, tmp_path_factory.mktemp(name) / name, contract)
        yield engine
        engine.portal.run(engine.aio.check_integrity())


def load(engine: Engine, model: Any, folder: Path, contract: dict[str, Any]) -> None:
    text = "<|im_start|>check\n"
    make_adapter_folder(model, folder, targets=SEVEN, invocation=tiny_chat().encode(text))
    (folder / "io.yaml").write_text(json.dumps(contract))
    (folder / "midstream.json").write_text(json.dumps({"format": 1, "invocation_text": text}))
    engine.load_adapter(folder)


@pytest.fixture
def talk(engine: Engine) -> Conversation:
    talk = engine.conversation()
    talk.user("How old? Tell me.", [Document(text="It stands. It is old.")])
    talk.reply(max_tokens=4)
    return talk


def test_a_likelihood_appends_only_and_is_read_off_the_forward(talk: Conversation) -> None:
    plain, score = talk.call("plain"), talk.call("score")
    assert 0.0 <= score.result <= 1.0
    assert score.usage.cached_base_tokens == plain.usage.cached_base_tokens == len(talk.token_ids)
    assert score.usage.forwards == plain.usage.forwards == 1
    assert score.completion.text == plain.completion.text
    # Of the labels' first tokens only those among the ten likeliest are weighed.
    first = next(t for t in score.completion.choices[0].logprobs or () if t.top)
    weights = {t.text: math.exp(t.logprob) for t in (first, *first.top) if "yes".startswith(t.text) or t.text == "n"}
    shares = sum(weight for text, weight in weights.items() if text != "n") / sum(weights.values())
    assert score.result == pytest.approx(shares)


def test_tags_change_the_turns_and_it_is_told(talk: Conversation) -> None:
    result = talk.call("tags")
    assert result.result in ("yes", "no")
    assert result.prefix_rewritten == "sentence tags in the last message and the documents"
    sent = tiny_chat().decode(result.completion.prompt_token_ids)
    assert "<c0> It stands. <c1> It is old." in sent
    with pytest.raises(InputError, match="rewrote what it judged"):
        talk.call("tags", keep=True)


def test_documents_are_moved_and_the_instruction_comes_last(talk: Conversation) -> None:
    result = talk.call("moved")
    assert result.prefix_rewritten == "documents as messages at the start"
    sent = tiny_chat().decode(result.completion.prompt_token_ids)
    assert sent.index("[Document None]\nIt stands.") < sent.index("How old?") < sent.index("Well?")
    assert "Document [1]" not in sent


def test_results_that_are_no_labels_are_not_measured(engine: Engine) -> None:
    (info,) = (info for info in engine.adapters() if info.name == "score")
    with pytest.raises(InputError, match="rows have the labels"):
        task_of(info)
