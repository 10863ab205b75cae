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
from midstream.intrinsics.spec import load_contract
from midstream.training.plain import described_task
from midstream.training.tasks import TASKS, Row, Task
from midstream.types import AdapterInfo

# Groups of fewer rows are not reported apart.
_GROUP = 10
_AT_ONCE = 8
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
    """Run every arm on every row: `base`, `base_constrained`, each adapter by its arm's name, and the shortcuts.

    `base_constrained` is left out where a task's answers are plain text: there is nothing to hold it to.
    """
    if not data.rows:
        raise InputError("no rows to evaluate on")
    predictors = {"base": by_base(backend, task, constrained=False)}
    if task.schema is not None:
        predictors["base_constrained"] = by_base(backend, task, constrained=True)
    predictors |= {arm: by_adapter(backend, task, info) for arm, info in adapters.items()}
    predictions: dict[str, list[Prediction]] = {arm: [] for arm in predictors}
    # In pieces, so that all arms of a row come close together and share its prefix while it is cached.
    for start in range(0, len(data.rows), _AT_ONCE):
        piece = data.rows[start : start + _AT_ONCE]
        for arm, predictor in predictors.items():
            predictions[arm] += await predict(predictor, piece, tick)
    predictions |= shortcuts(data.rows, task, data.train)
    if data.queries:
        predictions["reference"] = [Prediction(row.target) for row in data.rows]
    return _report(task, data, predictions, adapters)


def arm_count(task: Task, adapters: Mapping[str, AdapterInfo]) -> int:
    """How often `evaluate` ticks per row."""
    return 1 + (task.schema is not None) + len(adapters)


def task_of(info: AdapterInfo) -> Task:
    """What an adapter is measured on: the known task of its name, else what its contract describes.

    Raises InputError where its contract is not that of the task, or none that rows of targets can have.
    """
    contract = load_contract(info)
    if contract.transformations:
        raise InputError(f"adapter {info.name} answers with what its contract makes of labels; rows have the labels")
    name = str(info.metadata.get("task") or info.name)
    task = TASKS.get(name)
    if task is None:
        return described_task(name, contract.json_schema, contract.instruction)
    if contract.json_schema != task.schema:
        raise InputError(f"adapter {info.name} answers by another schema than the task {name}")
    return task


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
