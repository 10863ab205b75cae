"""The flows benchmark's comparisons, on rows whose answers are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from benchmarks.flows_data import knowledge_precision, token_f1
from benchmarks.flows_draw import Raw
from benchmarks.flows_report import gate, plots, summary
from benchmarks.flows_selection import best_by, compare, expected, majority, oracle, within_auroc

from midstream.types import Document


def candidate(quality: float, key: str = "a", **scores: float) -> dict[str, Any]:
    return {"quality": quality, "f1": quality, "key": key, "scores": scores}


ROW = {
    "group": "g",
    "candidates": [
        candidate(0.0, "no", certainty=0.2, hallucination=0.9),
        candidate(1.0, "yes", certainty=0.9, hallucination=0.1),
        candidate(0.0, "no", certainty=0.3, hallucination=0.8),
        candidate(1.0, "maybe", certainty=0.8, hallucination=0.8),
    ],
}


def test_each_strategy_takes_what_it_says() -> None:
    candidates = ROW["candidates"]
    assert isinstance(candidates, list)
    assert best_by("certainty")(candidates, "quality") == 1.0
    assert best_by("hallucination")(candidates, "quality") == 0.0
    assert best_by("hallucination", "certainty")(candidates, "quality") == 1.0
    assert majority()(candidates, "quality") == 0.0
    assert majority("certainty")(candidates, "quality") == 1.0, "one sure vote outweighs two doubtful ones"
    assert oracle(candidates, "quality") == 1.0
    assert expected(candidates, "quality") == 0.5
    assert within_auroc([ROW], "certainty", "quality") == 1.0
    assert within_auroc([ROW], "hallucination", "quality") == pytest.approx(0.5 / 4)


def test_a_gain_is_told_with_an_interval_over_the_rows() -> None:
    found = compare([ROW] * 6, {"certainty": best_by("certainty"), "oracle": oracle}, "quality")
    assert found["n"] == 6
    assert found["random"]["value"] == 0.5
    best = found["strategies"]["certainty"]
    assert set(best) == {"1", "2", "4"}, "no more candidates than there are"
    assert best["4"]["gain"] == {"value": 0.5, "low": 0.5, "high": 0.5}
    assert best["4"]["beats_random"]
    assert not best["1"]["beats_random"]


def test_the_gate_is_compared_at_equal_answer_rates() -> None:
    rows = [{"answerable": True, "scores": {"given": 0.1 * k}} for k in range(1, 11)]
    rows += [{"answerable": False, "scores": {"given": 0.05 * k}} for k in range(1, 11)]
    rows += [{"answerable": False, "scores": {}}]  # nothing was retrieved, so nothing is answered
    found = gate(rows, "given")
    assert (found["answerable"], found["unanswerable"]) == (10, 11)
    assert found["at_default"]["answer_rate_answerable"]["value"] == pytest.approx(0.6)
    assert found["at_default"]["answer_rate_unanswerable"]["value"] == pytest.approx(1 / 11)
    at = found["at_rate"]["0.8"]
    assert at["reduction"] == pytest.approx(1 - at["answer_rate_unanswerable"]["value"] / 0.8)
    assert 0.5 < found["auroc"] < 1


def test_words_are_what_is_measured() -> None:
    document = Document(title="The lizard", text="It sleeps in the sun.")
    assert knowledge_precision("A lizard sleeps.", [document]) == 1.0
    assert knowledge_precision("The cat sleeps", [document]) == 0.5
    assert knowledge_precision("", [document]) == 0.0
    assert token_f1("the sun", "sun") == 1.0
    assert token_f1("moon", "sun") == 0.0


def test_rows_are_run_once_and_reported(tmp_path: Path) -> None:
    raw = Raw(tmp_path / "raw.jsonl")
    work = [(name, lambda: {**ROW, "seconds": 1.0, "tokens": 5}) for name in ("a", "b")]
    for row in ROW["candidates"]:
        assert isinstance(row, dict)
        row.update(generating_tokens=10, judging_tokens=4)
    raw.fill("right", work, deadline=float("inf"))
    raw.fill("right", [("a", lambda: pytest.fail("it is there"))], deadline=float("inf"))
    raw.fill("right", [("c", lambda: pytest.fail("too late"))], deadline=0.0)
    again = Raw(tmp_path / "raw.jsonl")
    report = summary(again)
    assert report["right"]["n"] == 2
    assert report["right"]["cost"]["ratio"] == pytest.approx(0.4)
    plots(report, tmp_path / "plots")
    assert (tmp_path / "plots" / "selection.png").read_bytes().startswith(b"\x89PNG")
