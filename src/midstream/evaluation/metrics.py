"""Figures of merit with bootstrap intervals. The measures are those of scikit-learn, torchmetrics and rouge-score."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, roc_auc_score
from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

from midstream.evaluation.predict import Prediction
from midstream.training.tasks import Row, Task

ROUNDS = 1000
_BINS = 10
Index = NDArray[np.int64]
Measure = Callable[[Index], float]


@dataclass(frozen=True, slots=True)
class Figure:
    """A value on all rows, and the 2.5th and 97.5th percentile over bootstrap samples of the rows."""

    value: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def measures(predictions: Sequence[Prediction], rows: Sequence[Row], task: Task) -> dict[str, Measure]:
    """Each figure of merit as a function of which rows are looked at."""
    if task.kind == "text":
        return _text_measures(predictions, rows, task)
    if task.kind == "scale":
        return _chance_measures(
            np.array([p.value() for p in predictions]), np.array([bool(row.correct) for row in rows])
        )
    return _label_measures(predictions, rows, task)


def figures(found: Mapping[str, Measure], count: int, seed: int = 0) -> tuple[dict[str, Figure], dict[str, Any]]:
    """Each measure's figure, and its values over the bootstrap samples, which are the same for all arms of one seed."""
    rng = np.random.default_rng(seed)
    everything = np.arange(count)
    draws = [rng.integers(0, count, count) for _ in range(ROUNDS)]
    samples = {name: np.array([measure(draw) for draw in draws]) for name, measure in found.items()}
    report = {name: _figure(found[name](everything), samples[name]) for name in found}
    return {name: figure for name, figure in report.items() if not np.isnan(figure.value)}, samples


def difference(
    one: Mapping[str, Figure], other: Mapping[str, Figure], samples: Mapping[str, Any], others: Mapping[str, Any]
) -> dict[str, Figure]:
    """One arm less another on the same rows, draw by draw: a paired interval."""
    shared = [name for name in one if name in other]
    return {name: _figure(one[name].value - other[name].value, samples[name] - others[name]) for name in shared}


def _figure(value: float, samples: Any) -> Figure:
    usable = samples[~np.isnan(samples)]
    low, high = np.percentile(usable, [2.5, 97.5]) if len(usable) else (value, value)
    return Figure(float(value), float(low), float(high))


def _label_measures(predictions: Sequence[Prediction], rows: Sequence[Row], task: Task) -> dict[str, Measure]:
    number = {label: i for i, label in enumerate(task.labels)}
    none = len(task.labels)
    truth = np.array([number[row.target] for row in rows])
    said = np.array([number.get(p.answer, none) for p in predictions])
    binary = len(task.labels) == 2
    labels = [0] if binary else list(range(none))
    found: dict[str, Measure] = {
        "accuracy": lambda d: float(accuracy_score(truth[d], said[d])),
        "balanced_accuracy": lambda d: _balanced(truth[d], said[d], none),
        "f1": lambda d: float(f1_score(truth[d], said[d], labels=labels, average="macro", zero_division=0.0)),
    }
    if any(p.probabilities is None for p in predictions):
        return found
    shares = np.array([p.probabilities for p in predictions])
    if binary:
        chances = _chance_measures(shares[:, 0], truth == 0)
        return {**found, "auroc": chances["auroc"], "ece": chances["ece"]}
    return {
        **found,
        "auroc": lambda d: _auroc_of_many(truth[d], shares[d]),
        "ece": lambda d: float(
            multiclass_calibration_error(
                torch.from_numpy(shares[d]), torch.from_numpy(truth[d]), num_classes=none, n_bins=_BINS
            )
        ),
    }


def _chance_measures(chances: Any, came_true: Any) -> dict[str, Measure]:
    """Of chances [rows] that something is so, and whether it was."""
    guess = chances >= 0.5
    return {
        "accuracy": lambda d: float(accuracy_score(came_true[d], guess[d])),
        "balanced_accuracy": lambda d: _balanced(came_true[d].astype(int), guess[d].astype(int), 2),
        "f1": lambda d: float(f1_score(came_true[d], guess[d], zero_division=0.0)),
        "auroc": lambda d: _auroc(came_true[d], chances[d]),
        "ece": lambda d: float(
            binary_calibration_error(
                torch.from_numpy(np.ascontiguousarray(chances[d])),
                torch.from_numpy(came_true[d].astype(np.int64)),
                n_bins=_BINS,
            )
        ),
    }


def _text_measures(predictions: Sequence[Prediction], rows: Sequence[Row], task: Task) -> dict[str, Measure]:
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    wanted = [text_of(row.target, task) for row in rows]
    said = [text_of(p.answer, task) for p in predictions]
    exact = np.array([float(_plain(a) == _plain(b)) for a, b in zip(said, wanted, strict=True)])
    rouge = np.array([scorer.score(b, a)["rougeL"].fmeasure for a, b in zip(said, wanted, strict=True)])
    return {"exact_match": mean_of(exact), "rouge_l": mean_of(rouge)}


def mean_of(values: Any) -> Measure:
    """The mean of per-row values as a measure."""
    return lambda d: float(values[d].mean())


def text_of(answer: Any, task: Task) -> str:
    """The text in an answer; empty where there was none."""
    if answer is None:
        return ""
    return str(answer[task.key]) if task.key else str(answer)


def _plain(text: str) -> str:
    return " ".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def _balanced(truth: Any, said: Any, none: int) -> float:
    """NaN where only one label is there. An answer that is no label counts as wrong, not as a label of its own."""
    present = np.unique(truth)
    if len(present) < 2:
        return float("nan")
    wrong = (truth + 1) % none
    return float(balanced_accuracy_score(truth, np.where(said == none, np.where(wrong == truth, 0, wrong), said)))


def _auroc(truth: Any, scores: Any) -> float:
    return float("nan") if truth.all() or not truth.any() else float(roc_auc_score(truth, scores))


def _auroc_of_many(truth: Any, shares: Any) -> float:
    if len(np.unique(truth)) < shares.shape[1]:
        return float("nan")
    return float(roc_auc_score(truth, shares / shares.sum(axis=1, keepdims=True), multi_class="ovr", average="macro"))
