"""Figures of merit with bootstrap intervals. The measures themselves are those of torchmetrics and rouge-score."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rouge_score.rouge_scorer import RougeScorer
from torch import Tensor
from torchmetrics.functional import classification as tm

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
        chances = torch.tensor([p.value() for p in predictions], dtype=torch.float64)
        return _chance_measures(chances, torch.tensor([bool(row.correct) for row in rows]))
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
    count = len(task.labels)
    truth = torch.tensor([number[row.target] for row in rows])
    said = torch.tensor([-1 if p.answer is None else number[p.answer] for p in predictions])
    # An answer that is no label counts as a wrong one, whatever the right one is.
    said = torch.where(said < 0, (truth + 1) % max(2, count), said)
    shares = None
    if all(p.probabilities is not None for p in predictions):
        shares = torch.tensor([p.probabilities for p in predictions], dtype=torch.float64)
    if count == 2:
        return _binary(truth == 0, said == 0, None if shares is None else shares[:, 0])
    found: dict[str, Measure] = {
        "accuracy": _on(tm.multiclass_accuracy, said, truth, num_classes=count, average="micro"),
        "balanced_accuracy": _on(tm.multiclass_accuracy, said, truth, num_classes=count, average="macro"),
        "f1": _on(tm.multiclass_f1_score, said, truth, num_classes=count, average="macro"),
    }
    if shares is not None:
        found["auroc"] = _on(tm.multiclass_auroc, shares, truth, num_classes=count)
        found["ece"] = _on(tm.multiclass_calibration_error, shares, truth, num_classes=count, n_bins=_BINS)
    return found


def _chance_measures(chances: Tensor, came_true: Tensor) -> dict[str, Measure]:
    return _binary(came_true, chances >= 0.5, chances)


def _binary(truth: Tensor, said: Tensor, chances: Tensor | None) -> dict[str, Measure]:
    """Of a yes or no [rows], what was said, and the chances that were given to a yes."""
    right, answer = truth.long(), said.long()
    found: dict[str, Measure] = {
        "accuracy": _on(tm.binary_accuracy, answer, right),
        "balanced_accuracy": _on(tm.multiclass_accuracy, answer, right, num_classes=2, average="macro"),
        "f1": _on(tm.binary_f1_score, answer, right),
    }
    if chances is not None:
        found["auroc"] = _on(tm.binary_auroc, chances, right)
        found["ece"] = _on(tm.binary_calibration_error, chances, right, n_bins=_BINS)
    return found


def _on(metric: Callable[..., Tensor], given: Tensor, truth: Tensor, **options: Any) -> Measure:
    """A metric of torchmetrics on some rows. NaN where it needs every label and not all are among them."""
    classes = len(truth.unique())
    needs_all = metric in (tm.binary_auroc, tm.multiclass_auroc) or options.get("average") == "macro"

    def measure(draw: Index) -> float:
        index = torch.from_numpy(draw)
        chosen = truth[index]
        if needs_all and (classes < options.get("num_classes", 2) or len(chosen.unique()) < classes):
            return float("nan")
        return float(metric(given[index], chosen, validate_args=False, **options))

    return measure


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
