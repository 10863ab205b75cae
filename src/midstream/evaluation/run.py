"""Measuring an adapter beside the prompted base model, other adapters and the data's shortcuts, on the same rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from midstream.backend import Backend
from midstream.errors import InputError
from midstream.evaluation.baselines import shortcuts
from midstream.evaluation.metrics import Figure, Measure, difference, figures, mean_of, measures, text_of
from midstream.evaluation.predict import Prediction, by_adapter, by_base, predict
from midstream.evaluation.rows import EvalRows
from midstream.training.tasks import Row, Task
from midstream.types import AdapterInfo

# Groups of fewer rows are not reported apart.
_GROUP = 10
Figures = dict[str, Figure]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What was found. `differences`: each adapter less each other arm, paired. `groups`: accuracy by kind of row."""

    task: Task
    rows: Sequence[Row] = field(repr=False)
    left_out: int
    predictions: Mapping[str, Sequence[Prediction]] = field(repr=False)
    arms: Mapping[str, Figures]
    differences: Mapping[str, Figures]
    groups: Mapping[str, tuple[int, Mapping[str, Figures]]]
    adapters: Mapping[str, AdapterInfo]

    def as_dict(self) -> dict[str, Any]:
        """The form that programs read."""
        return {
            "task": self.task.name,
            "n": len(self.rows),
            "rows_left_out": self.left_out,
            "arms": _plain(self.arms),
            "differences": _plain(self.differences),
            "groups": {name: {"n": n, "arms": _plain(arms)} for name, (n, arms) in self.groups.items()},
            "adapters": {arm: {"name": info.name, "digest": info.digest} for arm, info in self.adapters.items()},
        }


async def evaluate(
    backend: Backend,
    task: Task,
    data: EvalRows,
    adapters: Mapping[str, AdapterInfo],
    *,
    tick: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Run every arm on every row: `base`, `base_constrained`, each adapter by its arm's name, and the shortcuts."""
    if not data.rows:
        raise InputError("no rows to evaluate on")
    predictors = {
        "base": by_base(backend, task, constrained=False),
        "base_constrained": by_base(backend, task, constrained=True),
        **{arm: by_adapter(backend, task, info) for arm, info in adapters.items()},
    }
    predictions: dict[str, list[Prediction]] = {arm: [] for arm in predictors}
    # In pieces, so that all arms of a row come close together and share its prefix while it is cached.
    for start in range(0, len(data.rows), 8):
        piece = data.rows[start : start + 8]
        for arm, predictor in predictors.items():
            predictions[arm] += await predict(predictor, piece, tick)
    predictions |= shortcuts(data.rows, task, data.train)
    if data.queries:
        predictions["reference"] = [Prediction(row.target) for row in data.rows]
    return _report(task, data, predictions, adapters)


def arm_count(adapters: Mapping[str, AdapterInfo]) -> int:
    """How often `evaluate` ticks per row."""
    return 2 + len(adapters)


def _report(
    task: Task, data: EvalRows, predictions: dict[str, list[Prediction]], adapters: Mapping[str, AdapterInfo]
) -> Evaluation:
    found: dict[str, dict[str, Measure]] = {arm: measures(p, data.rows, task) for arm, p in predictions.items()}
    if data.corpus is not None:
        for arm, answers in predictions.items():
            texts = [text_of(answer.answer, task) for answer in answers]
            found[arm]["recall_at_5"] = mean_of(data.corpus.recalls(texts, data.queries))
    both = {arm: figures(each, len(data.rows)) for arm, each in found.items()}
    arms = {arm: report for arm, (report, _) in both.items()}
    differences = {
        f"{arm} - {other}": difference(*_pair(both, arm, other)) for arm in adapters for other in both if other != arm
    }
    return Evaluation(
        task, data.rows, data.left_out, predictions, arms, differences, _groups(data.rows, found), adapters
    )


def _pair(both: Mapping[str, Any], arm: str, other: str) -> tuple[Any, Any, Any, Any]:
    (one, samples), (two, others) = both[arm], both[other]
    return one, two, samples, others


def _groups(
    rows: Sequence[Row], found: Mapping[str, Mapping[str, Measure]]
) -> dict[str, tuple[int, Mapping[str, Figures]]]:
    names = sorted({row.group for row in rows})
    groups: dict[str, tuple[int, Mapping[str, Figures]]] = {}
    for name in names if len(names) > 1 else ():
        index = np.array([i for i, row in enumerate(rows) if row.group == name])
        if len(index) >= _GROUP:
            groups[name] = (len(index), {arm: _in_group(each, index) for arm, each in found.items()})
    return groups


def _in_group(each: Mapping[str, Measure], index: Any) -> Figures:
    """The first measure alone, and the AUROC or recall where there is one: a group is small."""
    chosen = {name: each[name] for name in ("accuracy", "auroc", "rouge_l", "recall_at_5") if name in each}
    within: dict[str, Measure] = {name: _on(measure, index) for name, measure in chosen.items()}
    return figures(within, len(index))[0]


def _on(measure: Measure, index: Any) -> Measure:
    return lambda draw: measure(index[draw])


def _plain(arms: Mapping[str, Figures]) -> dict[str, dict[str, dict[str, float]]]:
    return {arm: {name: figure.as_dict() for name, figure in each.items()} for arm, each in arms.items()}
