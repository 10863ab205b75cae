"""An evaluation as a table, as one picture, and as the figures of a model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Column, Table
from sklearn.calibration import calibration_curve
from sklearn.metrics import roc_curve

from midstream.errors import InputError
from midstream.evaluation.catalogue import FIGURES_FILE, cell
from midstream.evaluation.metrics import Figure
from midstream.evaluation.run import Evaluation
from midstream.training.card import FIGURES_END, FIGURES_START

Report = Mapping[str, Any]
_ARMS = {
    "base": "the prompted base model, its free answer read",
    "base_constrained": "the prompted base model, held to the same answers",
    "lora": "the plain LoRA beside this one, whose card says what it was trained on",
    "tfidf": "logistic regression on the words of the judged text",
    "word_overlap": "logistic regression on the share of its words that the documents have",
    "last_turn": "the question as it was asked",
    "reference": "the rewrite that comes with the data",
}


def table(evaluation: Evaluation) -> Table:
    """All arms with all figures and their intervals, for a terminal."""
    arms = evaluation.as_dict()["arms"]
    names = _names(arms)
    # Names whole, figures in as many lines as it takes: on a narrow terminal too.
    first = Column("arm", no_wrap=True, min_width=max(map(len, arms)))
    shown = Table(first, *names, title=f"{evaluation.task.name}, {len(evaluation.rows)} rows, 95 % intervals")
    for arm, each in arms.items():
        shown.add_row(arm, *(cell(each.get(name)) for name in names))
    return shown


def write_picture(path: Path, evaluation: Evaluation) -> None:
    """One PNG: ROC and reliability curves of the arms that give chances; for texts, each figure with its interval."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(11, 4.5), layout="constrained")
    if evaluation.task.kind == "text":
        _bars(canvas.subplots(), evaluation)
    else:
        roc, reliability = canvas.subplots(1, 2)
        _curves(roc, reliability, evaluation)
    canvas.suptitle(f"{evaluation.task.name}, {len(evaluation.rows)} rows")
    canvas.savefig(path, dpi=120)


def _curves(roc: Any, reliability: Any, evaluation: Evaluation) -> None:
    for arm in evaluation.arms:
        found = _chances(evaluation, arm)
        if found is None:
            continue
        truth, chances = found
        false, true, _ = roc_curve(truth, chances)
        roc.plot(false, true, label=arm)
        share, mean = calibration_curve(truth, chances, n_bins=10)
        reliability.plot(mean, share, marker="o", markersize=3, label=arm)
    for axes, across, up in ((roc, "false positives", "true positives"), (reliability, "predicted chance", "share")):
        axes.plot([0, 1], [0, 1], color="grey", linewidth=0.6, linestyle="--")
        axes.set(xlabel=across, ylabel=up, xlim=(0, 1), ylim=(0, 1))
        axes.legend(fontsize=8)


def _chances(evaluation: Evaluation, arm: str) -> tuple[Any, Any] | None:
    """Truth and chance of the positive label (of each label, where there are many) for the curves of an arm."""
    predictions, task = evaluation.predictions[arm], evaluation.task
    if task.kind == "scale":
        truth = np.array([bool(row.correct) for row in evaluation.rows])
        chances = np.array([p.value() for p in predictions])
    else:
        if any(p.probabilities is None for p in predictions):
            return None
        shares = np.array([p.probabilities for p in predictions])
        hits = np.array([[row.target == label for label in task.labels] for row in evaluation.rows])
        truth, chances = (hits[:, 0], shares[:, 0]) if len(task.labels) == 2 else (hits.ravel(), shares.ravel())
    if truth.all() or not truth.any():
        return None
    return truth, np.clip(chances, 0.0, 1.0)


def _bars(axes: Any, evaluation: Evaluation) -> None:
    names, arms = _names(evaluation.arms), list(evaluation.arms)
    for i, arm in enumerate(arms):
        each = [evaluation.arms[arm].get(name, Figure(0.0, 0.0, 0.0)) for name in names]
        places = np.arange(len(names)) + i / (len(arms) + 1)
        spread = np.array([[max(0.0, f.value - f.low), max(0.0, f.high - f.value)] for f in each]).T
        axes.bar(places, [f.value for f in each], 0.9 / (len(arms) + 1), yerr=spread, label=arm)
    axes.set_xticks(np.arange(len(names)) + 0.3, names)
    axes.legend(fontsize=8)


def markdown(report: Report, command: str) -> str:
    """A report (`Evaluation.as_dict`) as Markdown: arms, the adapter less the others, a verdict, and groups of rows."""
    known = [f"`{arm}`: {text}" for arm, text in _ARMS.items() if arm in report["arms"]]
    lines = [f"On {report['n']} rows, with bootstrap 95 % intervals. {'; '.join(known)}.", ""]
    lines += _rows(report["arms"], "arm")
    less = {name: each for name, each in report["differences"].items() if name.startswith("alora - ")}
    if less:
        lines += ["", "Paired differences on the same rows:", "", *_rows(less, "difference"), ""]
        lines += [f"- {_verdict(name.removeprefix('alora - '), each)}" for name, each in less.items()]
    for group, found in report["groups"].items():
        lines += ["", f"Of these, `{group or 'other'}`, {found['n']} rows:", "", *_rows(found["arms"], "arm")]
    return "\n".join([*lines, "", "```sh", command, "```"])


def _verdict(other: str, each: Mapping[str, Mapping[str, float]]) -> str:
    """In words: where an interval excludes 0, the adapter is better or worse; else nothing is shown."""
    found: dict[str, list[str]] = {"better": [], "worse": [], "not shown to differ": []}
    for name, figure in each.items():
        better, worse = figure["low"] > 0, figure["high"] < 0
        if name == "ece":
            better, worse = worse, better
        found["better" if better else "worse" if worse else "not shown to differ"].append(name)
    said = "; ".join(f"{verdict} in {', '.join(names)}" for verdict, names in found.items() if names)
    return f"Against `{other}`: {said}."


def check_card(folder: Path) -> tuple[str, str, str]:
    """A card's text before, within and after the place for figures. Raises InputError where there is none."""
    path = folder / "README.md"
    content = path.read_text(encoding="utf-8") if path.is_file() else ""
    if FIGURES_START not in content or FIGURES_END not in content:
        raise InputError(f"{path} has no place for figures ({FIGURES_START} ... {FIGURES_END})")
    before, rest = content.split(FIGURES_START, 1)
    inside, after = rest.split(FIGURES_END, 1)
    return before, inside, after


def update_card(folder: Path, title: str, evaluation: Evaluation, command: str) -> None:
    """Put figures under a title into a card and into evaluation.json, in the place of those under the same title.

    Raises InputError where the folder has no card with a place for them.
    """
    before, inside, after = check_card(folder)
    sections = dict(part.split("\n", 1) for part in inside.split("\n### ")[1:])
    report = evaluation.as_dict()
    sections[title] = markdown(report, command)
    body = "".join(f"\n### {name}\n\n{text.strip()}\n" for name, text in sections.items())
    (folder / "README.md").write_text(f"{before}{FIGURES_START}{body}\n{FIGURES_END}{after}", encoding="utf-8")
    figures = folder / FIGURES_FILE
    reports = json.loads(figures.read_text(encoding="utf-8")) if figures.is_file() else {}
    reports[title] = {"command": command, **report}
    figures.write_text(json.dumps(reports, indent=1) + "\n", encoding="utf-8")


def _rows(arms: Mapping[str, Mapping[str, Any]], first: str) -> list[str]:
    names = _names(arms)
    head = [f"| {first} | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    return head + [f"| {arm} | {' | '.join(cell(each.get(name)) for name in names)} |" for arm, each in arms.items()]


def _names(arms: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for each in arms.values() for name in each))
