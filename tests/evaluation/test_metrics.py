"""Figures against hand-worked cases and scikit-learn; intervals that cover; paired differences."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from sklearn import metrics as reference

from midstream.evaluation.metrics import difference, figures, measures
from midstream.evaluation.predict import Prediction, understand
from midstream.training.tasks import TASKS, Row, Task
from midstream.types import Chat, Message

CHAT = Chat(messages=(Message(role="user", content="x"),))
BINARY = TASKS["hallucination"]
THREE = Task("three", lambda row: None, "label", "", labels=("a", "b", "c"))


def rows(task: Task, targets: list[Any], correct: list[bool] | None = None) -> list[Row]:
    truths = correct or [None] * len(targets)  # type: ignore[list-item]
    return [Row(CHAT, target, correct=truth) for target, truth in zip(targets, truths, strict=True)]


def random_case(task: Task, count: int = 120) -> tuple[list[Prediction], list[Row]]:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, len(task.labels), count)
    shares = rng.dirichlet(np.ones(len(task.labels)), count) + 0.5 * np.eye(len(task.labels))[truth]
    shares /= shares.sum(axis=1, keepdims=True)
    predictions = [Prediction(task.labels[int(share.argmax())], tuple(map(float, share))) for share in shares]
    return predictions, rows(task, [task.labels[t] for t in truth])


def test_two_labels_agree_with_scikit_learn() -> None:
    predictions, truth = random_case(BINARY)
    found, _ = figures(measures(predictions, truth, BINARY), len(truth))
    yes = np.array([row.target == "grounded" for row in truth])
    said = np.array([p.answer == "grounded" for p in predictions])
    chance = np.array([p.probabilities[0] for p in predictions if p.probabilities])
    assert found["accuracy"].value == pytest.approx(reference.accuracy_score(yes, said))
    assert found["balanced_accuracy"].value == pytest.approx(reference.balanced_accuracy_score(yes, said))
    assert found["f1"].value == pytest.approx(reference.f1_score(yes, said))
    assert found["auroc"].value == pytest.approx(reference.roc_auc_score(yes, chance))
    for figure in found.values():
        assert figure.low <= figure.value <= figure.high or figure.low - 0.05 < figure.value < figure.high + 0.05
        assert 0.02 < figure.high - figure.low < 0.5


def test_many_labels_agree_with_scikit_learn() -> None:
    predictions, truth = random_case(THREE)
    found, _ = figures(measures(predictions, truth, THREE), len(truth))
    target, said = [row.target for row in truth], [p.answer for p in predictions]
    shares = np.array([p.probabilities for p in predictions])
    assert found["accuracy"].value == pytest.approx(reference.accuracy_score(target, said))
    assert found["balanced_accuracy"].value == pytest.approx(reference.balanced_accuracy_score(target, said))
    assert found["f1"].value == pytest.approx(reference.f1_score(target, said, average="macro"))
    assert found["auroc"].value == pytest.approx(reference.roc_auc_score(target, shares, multi_class="ovr"))


def test_an_answer_that_is_no_label_is_wrong() -> None:
    predictions = [Prediction("grounded"), Prediction(None), Prediction("ungrounded"), Prediction(None)]
    truth = rows(BINARY, ["grounded", "grounded", "ungrounded", "ungrounded"])
    found, _ = figures(measures(predictions, truth, BINARY), 4)
    assert found["accuracy"].value == 0.5
    assert "auroc" not in found


def test_one_label_alone_has_an_accuracy_and_no_auroc() -> None:
    predictions = [Prediction("grounded", (0.9, 0.1))] * 5
    found, _ = figures(measures(predictions, rows(BINARY, ["grounded"] * 5), BINARY), 5)
    assert found["accuracy"].value == 1.0
    assert "auroc" not in found
    assert "balanced_accuracy" not in found


@pytest.mark.parametrize(("chance", "ece"), [(7, 0.05), (0, 0.75)])
def test_calibration_of_a_scale_is_the_distance_to_the_share_that_came_true(chance: int, ece: float) -> None:
    task = TASKS["certainty"]
    shares = tuple(float(k == chance) for k in range(10))
    truth = rows(task, [8] * 40, [i % 5 > 0 for i in range(40)])
    found, _ = figures(measures([Prediction(chance, shares)] * 40, truth, task), 40)
    assert found["ece"].value == pytest.approx(ece, abs=1e-5)


def test_texts_are_compared_without_case_and_punctuation() -> None:
    task = TASKS["query_rewrite"]
    truth = rows(task, [{"rewritten_question": "Who wrote it?"}] * 3)
    said = [{"rewritten_question": "who wrote it"}, {"rewritten_question": "Who wrote the book?"}, None]
    found, _ = figures(measures([Prediction(answer) for answer in said], truth, task), 3)
    assert found["exact_match"].value == pytest.approx(1 / 3)
    assert found["rouge_l"].value == pytest.approx((1 + 4 / 7 + 0) / 3, abs=0.01)


def test_a_difference_is_paired() -> None:
    """Two arms that are right on nearly the same rows differ by far less than either varies."""
    rng = random.Random(0)
    right = [rng.random() < 0.5 for _ in range(200)]
    truth = rows(BINARY, ["grounded"] * 200)
    one = [Prediction("grounded" if r else "ungrounded") for r in right]
    other = [Prediction("grounded")] * 4 + one[4:]
    (a, samples), (b, others) = (figures(measures(p, truth, BINARY), 200) for p in (other, one))
    found = difference(a, b, samples, others)["accuracy"]
    assert found.value == pytest.approx(a["accuracy"].value - b["accuracy"].value)
    assert found.high - found.low < 0.04 < a["accuracy"].high - a["accuracy"].low


@pytest.mark.parametrize(
    ("text", "name", "answer"),
    [
        ("Grounded.", "hallucination", "grounded"),
        ('"ungrounded" because', "hallucination", "ungrounded"),
        ("It is not met", "requirement_check", "not_met"),
        ("It is met.", "requirement_check", "met"),
        ("The question is not answerable.", "answerability", None),
        ("not met, sorry", "requirement_check", "not_met"),
        ("I think it is answerable", "answerability", "answerable"),
        ("yes or no", "jailbreak", "yes"),
        ("either yes or no", "jailbreak", None),
        ("nonsense", "jailbreak", None),
        ("about 7 of 10", "certainty", 7),
        ("10/10", "certainty", None),
        ("5%", "certainty", None),
        ("sure", "certainty", None),
        ('"Who is he?"\nmore', "query_rewrite", {"rewritten_question": "Who is he?"}),
    ],
)
def test_free_answers_are_understood_or_count_as_none(text: str, name: str, answer: Any) -> None:
    assert understand(text, TASKS[name]) == answer
