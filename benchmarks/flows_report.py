"""From raw rows to what they say: selection, the answerability gate, turns with and without each intrinsic."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np

from benchmarks.common import interval
from benchmarks.flows_selection import best_by, compare, majority, oracle, within_auroc

matplotlib.use("Agg")
from matplotlib import pyplot as plt

if TYPE_CHECKING:
    from benchmarks.flows_draw import Raw

Row = Mapping[str, Any]
_GUARD = 0.5
_GATE = 0.5
_RATES = (0.95, 0.9, 0.8, 0.7)
_BY = {
    "hallucination": best_by("hallucination"),
    "certainty": best_by("certainty"),
    "both": best_by("hallucination", "certainty"),
    "oracle": oracle,
}


def summary(raw: Raw) -> dict[str, Any]:
    """Everything that the rows so far say."""
    found: dict[str, Any] = {}
    if rows := raw.part("right"):
        found["right"] = _right(rows)
    if rows := raw.part("grounded"):
        found["grounded"] = {
            **compare(rows, _BY, "quality"),
            "f1": compare(rows, _BY, "f1"),
            "within_auroc": {name: within_auroc(rows, name, "quality") for name in ("hallucination", "certainty")},
            "cost": _cost(rows),
        }
    if rows := raw.part("turns"):
        without = {row["id"]: row for row in raw.part("turns, no rewrite")}
        found["turns"] = _turns(rows, without)
    if rows := raw.part("gate"):
        found["gate"] = {name: gate(rows, name) for name in ("given", "retrieved")}
    if rows := raw.part("time"):
        found["time"] = rows[0]["rows"]
    return found


def _right(rows: Sequence[Row]) -> dict[str, Any]:
    """By certainty on all questions; groundedness is scored only where there is a passage."""
    votes = {
        "certainty": best_by("certainty"),
        "majority": majority(),
        "weighted majority": majority("certainty"),
        "oracle": oracle,
    }
    found = {
        **compare(rows, votes, "quality"),
        "within_auroc": within_auroc(rows, "certainty", "quality"),
        "cost": _cost(rows),
    }
    groups = sorted({row["group"] for row in rows})
    found["by_source"] = {
        group: compare([row for row in rows if row["group"] == group], votes, "quality") for group in groups
    }
    with_passage = [row for row in rows if all("hallucination" in c["scores"] for c in row["candidates"])]
    if with_passage:
        found["with_passage"] = compare(with_passage, _BY, "quality")
    return found


def _cost(rows: Sequence[Row]) -> dict[str, float]:
    """Tokens of judging all candidates beside those of generating them."""
    generating = sum(c["generating_tokens"] for row in rows for c in row["candidates"])
    judging = sum(c["judging_tokens"] for row in rows for c in row["candidates"])
    return {
        "generating_tokens": generating / len(rows),
        "judging_tokens": judging / len(rows),
        "ratio": judging / generating,
        "seconds": float(np.median([row["seconds"] for row in rows])),
    }


def gate(rows: Sequence[Row], name: str) -> dict[str, Any]:
    """Answers given to unanswerable questions, gated by answerability, at several answer rates on answerable ones.

    Without a gate every question is answered. A gate that knows nothing answers both kinds at the same rate.
    """
    # Where nothing was found the flow answers nothing.
    yes = np.array([row["scores"].get(name, 0.0) for row in rows if row["answerable"]])
    no = np.array([row["scores"].get(name, 0.0) for row in rows if not row["answerable"]])
    if not len(yes) or not len(no):
        return {}
    pairs = (yes[:, None] > no[None, :]).mean() + 0.5 * (yes[:, None] == no[None, :]).mean()
    found: dict[str, Any] = {
        "answerable": len(yes),
        "unanswerable": len(no),
        "auroc": float(pairs),
        "at_default": {
            "threshold": _GATE,
            "answer_rate_answerable": interval((yes >= _GATE).astype(float)),
            "answer_rate_unanswerable": interval((no >= _GATE).astype(float)),
        },
        "at_rate": {},
    }
    for rate in _RATES:
        threshold = float(np.quantile(yes, 1 - rate))
        answered = interval((no >= threshold).astype(float))
        found["at_rate"][str(rate)] = {
            "threshold": threshold,
            "answer_rate_unanswerable": answered,
            "reduction": 1 - answered["value"] / rate,
        }
    return found


def _turns(rows: Sequence[Row], without: Mapping[str, Row]) -> dict[str, Any]:
    """The turn with all intrinsics, and with each left out: what is answered, and how well."""
    kinds: dict[str, Callable[[Row], bool]] = {
        "all": lambda row: _passes(row),
        "no guard": lambda row: _passes(row, "jailbreak"),
        "no answerability": lambda row: _passes(row, "answerability"),
        "no hallucination": lambda row: _passes(row, "hallucination"),
        "no certainty": lambda row: _passes(row, "certainty"),
        "base alone": lambda _: True,
    }
    found = {name: _outcome(rows, given) for name, given in kinds.items()}
    plain = [without[row["id"]] for row in rows if row["id"] in without]
    if plain:
        found["no rewrite"] = _outcome(plain, _passes)
    return found


def _passes(row: Row, but: str = "") -> bool:
    """Whether a turn is answered and its answer trusted, with one intrinsic left out."""
    scores = {name: value for name, value in row["scores"].items() if name != but}
    return (
        scores.get("jailbreak", 0.0) < _GUARD
        and scores.get("answerability", 1.0) >= _GATE
        and scores.get("hallucination", 1.0) >= 0.5
        and scores.get("certainty", 1.0) >= 0.2
    )


def _outcome(rows: Sequence[Row], given: Callable[[Row], bool]) -> dict[str, Any]:
    kept = [row for row in rows if given(row)]
    found: dict[str, Any] = {
        "n": len(rows),
        "trusted_answerable": interval(np.array([float(given(r)) for r in rows if r["answerable"]])),
        "trusted_unanswerable": interval(np.array([float(given(r)) for r in rows if not r["answerable"]])),
        "recall_at_3": interval(np.array([r["recall"] for r in rows if r["recall"] is not None])),
    }
    answered = [row for row in kept if row["answerable"]]
    if answered:
        found["f1_of_trusted"] = interval(np.array([row["f1"] for row in answered]))
    if kept:
        found["precision_of_trusted"] = interval(np.array([row["precision"] for row in kept]))
    return found


def plots(report: Mapping[str, Any], folder: Path) -> None:
    """Quality against the number of candidates, and the gate's curve, as PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = [name for name in ("right", "grounded") if name in report]
    if parts:
        figure, axes = plt.subplots(1, len(parts), figsize=(6 * len(parts), 4), squeeze=False)
        for axis, name in zip(axes[0], parts, strict=True):
            _selection(axis, name, report[name])
        figure.tight_layout()
        figure.savefig(folder / "selection.png", dpi=120)
        plt.close(figure)


def _selection(axis: Any, name: str, part: Mapping[str, Any]) -> None:
    for strategy, sizes in part["strategies"].items():
        counts = [int(size) for size in sizes]
        values = [sizes[str(count)]["value"] for count in counts]
        axis.plot(counts, values, marker="o", label=strategy)
        axis.fill_between(
            counts, [sizes[str(c)]["low"] for c in counts], [sizes[str(c)]["high"] for c in counts], alpha=0.12
        )
    axis.axhline(part["random"]["value"], color="grey", linestyle=":", label="one at random")
    axis.set_xscale("log", base=2)
    axis.set_xlabel("answers drawn")
    axis.set_ylabel("share right" if name == "right" else "knowledge precision")
    axis.set_title(f"{name}, n = {part['n']}")
    axis.legend(fontsize=8)
