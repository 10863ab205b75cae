"""The shipped intrinsics as functions, by the contracts that ship with them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from midstream import intrinsics
from midstream.errors import AdapterNotFound, ContractError, InputError, OutputError
from midstream.evaluation.predict import Prediction
from midstream.intrinsics import (
    answerability,
    certainty,
    hallucination,
    jailbreak,
    query_rewrite,
    requirement_check,
)
from midstream.training.tasks import TASKS
from midstream.types import Chat, Choice, JsonSchema, Message
from tests.intrinsics.backends import Answering, adapter
from tests.intrinsics.reference import config

LIBRARY = Path(__file__).parents[2] / "library" / "smollm2-135m-instruct"
CHAT = Chat(messages=(Message(role="user", content="one"), Message(role="assistant", content="two")))
Function = Callable[..., Awaitable[Any]]


def shipped(name: str, text: str, **options: Any) -> Answering:
    contract = yaml.safe_load((LIBRARY / name / "io.yaml").read_text())
    return Answering([adapter(name, contract, TASKS[name].reads)], text, **options)


@pytest.mark.parametrize(
    ("function", "positive", "negative", "field"),
    [
        (answerability, "answerable", "unanswerable", "answerable"),
        (hallucination, "grounded", "ungrounded", "grounded"),
        (jailbreak, "yes", "no", "jailbreak"),
    ],
)
async def test_a_label_is_a_truth_value_with_its_probability(
    function: Function, positive: str, negative: str, field: str
) -> None:
    for answer, other, share in ((positive, negative, 0.9), (negative, positive, 0.7)):
        backend = shipped(function.__name__, f'"{answer}"', shares={f'"{answer}"': share, f'"{other}"': 1 - share})
        found = await function(backend, CHAT)
        assert getattr(found, field) is (answer == positive)
        assert found.probability == pytest.approx(share if answer == positive else 1 - share)
        assert found.call.intrinsic == function.__name__
        assert isinstance(backend.requests[0].params.constraint, Choice)


async def test_a_requirement_is_checked_in_words() -> None:
    backend = shipped("requirement_check", '"not_met"', shares={'"met"': 0.2, '"not_met"': 0.8})
    found = await requirement_check(backend, CHAT, "Be {kind}.")
    assert (found.met, found.probability) == (False, 0.2)
    prompt = backend.requests[0].prompt
    assert isinstance(prompt, Chat)
    assert prompt.appended[0].content == "Requirement: Be {kind}."


async def test_certainty_is_the_chance_that_the_evaluation_measures() -> None:
    weights = [1, 2, 3, 4, 5, 6, 7, 9, 9, 4]
    shares = [weight / sum(weights) for weight in weights]
    backend = shipped("certainty", "8", shares={str(k): share for k, share in enumerate(shares)})
    found = await certainty(backend, CHAT)
    assert found.certainty == Prediction(8, tuple(shares)).value()
    assert 0.5 < found.certainty < 1
    sure = shipped("certainty", "9", shares={str(k): float(k == 9) for k in range(10)})
    assert (await certainty(sure, CHAT)).certainty == pytest.approx(0.95)


async def test_a_question_is_rewritten() -> None:
    backend = shipped("query_rewrite", '{"rewritten_question": "How old is the lamp?"}')
    found = await query_rewrite(backend, CHAT)
    assert found.question == "How old is the lamp?"
    assert isinstance(backend.requests[0].params.constraint, JsonSchema)
    with pytest.raises(OutputError, match="does not fit"):
        await query_rewrite(shipped("query_rewrite", '{"question": "x"}'), CHAT)


ANOTHER: list[tuple[Function, dict[str, Any], str]] = [
    (jailbreak, config(response_format={"enum": ["safe", "unsafe"]}), "needs one of 'yes', 'no'"),
    (jailbreak, config(), "answers with plain text; this function needs one of 'yes', 'no'"),
    (
        jailbreak,
        config(
            response_format={"enum": ["yes", "no"]},
            transformations=[{"type": "nest", "input_path": [], "field_name": "n"}],
        ),
        "which is then transformed",
    ),
    (certainty, config(response_format={"enum": list(range(11))}), "needs one of 0, 1"),
    (query_rewrite, config(response_format={"type": "object", "properties": {"q": {}}}), "'rewritten_question'"),
    (query_rewrite, config(response_format={"type": "string"}), "'rewritten_question'"),
]


@pytest.mark.parametrize(("function", "contract", "reason"), ANOTHER)
async def test_another_adapter_of_that_name_is_not_even_asked(
    function: Function, contract: dict[str, Any], reason: str
) -> None:
    backend = Answering([adapter(function.__name__, contract)], '"yes"')
    with pytest.raises(ContractError, match=reason):
        await function(backend, CHAT)
    assert not backend.requests


async def test_what_a_backend_does_not_give_is_missed() -> None:
    with pytest.raises(OutputError, match="without the probabilities"):
        await jailbreak(shipped("jailbreak", '"yes"'), CHAT)
    loose = config(response_format={"properties": {"rewritten_question": {}}})
    with pytest.raises(OutputError, match="no rewritten_question"):
        await query_rewrite(Answering([adapter("query_rewrite", loose)], '{"rewritten_question": 3}'), CHAT)
    with pytest.raises(AdapterNotFound, match="'jailbreak'"):
        await jailbreak(Answering([], "x"), CHAT)
    other = config(response_format={"enum": ["met", "not_met"]}, instruction="Check {it}")
    with pytest.raises(InputError, match="does not take requirement"):
        await requirement_check(Answering([adapter("requirement_check", other)], "x"), CHAT, "y")


async def test_an_adapter_may_have_another_name() -> None:
    backend = shipped("jailbreak", '"yes"', shares={'"yes"': 1.0, '"no"': 0.0})
    with pytest.raises(AdapterNotFound, match="'mine'"):
        await jailbreak(backend, CHAT, adapter="mine")
    assert (await jailbreak(backend, CHAT, adapter="jailbreak")).jailbreak


def test_every_shipped_task_has_its_function() -> None:
    assert set(TASKS) <= set(intrinsics.__all__)
    assert sorted(intrinsics.__all__, key=str) == intrinsics.__all__
