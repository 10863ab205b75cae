"""How well a label adapter does beside the prompted base model, on the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from sklearn.metrics import accuracy_score, balanced_accuracy_score, roc_auc_score

from midstream.training.base_kv import BaseKV
from midstream.training.data import Example
from midstream.training.losses import target_logits

Figures = dict[str, dict[str, dict[str, float]]]


@torch.no_grad()
def positive_probabilities(
    network: Any,
    examples: Sequence[Example],
    labels: Sequence[Sequence[int]],
    base_kv: BaseKV | None,
    *,
    batch_size: int = 16,
    progress: str = "",
) -> np.ndarray:
    """P(first label) of each example, between the two labels, read where their tokens part."""
    parting = next(i for i, (a, b) in enumerate(zip(labels[0], labels[1], strict=False)) if a != b)
    choices = torch.tensor([labels[0][parting], labels[1][parting]])
    tail = tuple(labels[0][: parting + 1])
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].prefix))
    result = np.zeros(len(examples))
    starts = range(0, len(order), batch_size)
    for start in track(starts, progress, console=Console(stderr=True), disable=not progress):
        index = order[start : start + batch_size]
        batch = [examples[i] for i in index]
        logits = target_logits(network, batch, base_kv, [tail] * len(batch))
        deciding = logits.view(len(batch), len(tail), -1)[:, -1].float()
        result[index] = torch.softmax(deciding[:, choices.to(deciding.device)], dim=-1)[:, 0].cpu().numpy()
    return result


def figures(
    probabilities: np.ndarray,
    examples: Sequence[Example],
    positive: str,
    *,
    seed: int = 0,
    rounds: int = 1000,
) -> dict[str, dict[str, float]]:
    """Accuracy, balanced accuracy and AUROC, each with a bootstrap 95 % interval, and the number of rows."""
    truth = np.array([e.label == positive for e in examples])
    rng = np.random.default_rng(seed)
    draws = [rng.integers(0, len(truth), len(truth)) for _ in range(rounds)]
    measures = {
        "accuracy": lambda t, p: accuracy_score(t, p >= 0.5),
        "balanced_accuracy": lambda t, p: balanced_accuracy_score(t, p >= 0.5),
        "auroc": roc_auc_score,
    }
    report: dict[str, dict[str, float]] = {"rows": {"value": float(len(truth))}}
    for name, measure in measures.items():
        if (truth.all() or not truth.any()) and name != "accuracy":
            continue
        values = [
            measure(truth[d], probabilities[d]) for d in draws if name == "accuracy" or 0 < truth[d].sum() < len(d)
        ]
        low, high = np.percentile(values, [2.5, 97.5])
        report[name] = {"value": float(measure(truth, probabilities)), "low": float(low), "high": float(high)}
    return report


def by_group(probabilities: np.ndarray, examples: Sequence[Example], positive: str) -> Figures:
    """Figures over all rows and over each group of rows."""
    report: Figures = {"all": figures(probabilities, examples, positive)}
    for group in sorted({e.group for e in examples}):
        index = [i for i, e in enumerate(examples) if e.group == group]
        report[group] = figures(probabilities[index], [examples[i] for i in index], positive)
    return report
