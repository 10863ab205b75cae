"""Figures from raw measurements, tables, pictures; what is missing stays out of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from midstream.bench import plot
from midstream.bench.plot import check_plot, draw
from midstream.bench.report import FIGURES, Report, Row
from midstream.bench.table import head, table, warnings
from midstream.errors import InputError

CALLS = {
    "base_all_s": [2.0, 4.0, 3.0],
    "base_last_s": [0.1, 0.1, 0.1],
    "label_lora_s": [2.0, 4.5, 3.0],
    "label_alora_s": [0.1, 0.15, 0.2],
    "free_lora_s": [5.0, 6.0, 5.5],
    "free_alora_s": [2.0, 2.0, 2.2],
    "fanout_s": [0.2, 0.3, 0.3],
    "kv_one_bytes": [1000.0, 1000.0, 1000.0],
    "kv_all_bytes": [1050.0, 1050.0, 1050.0],
}
DECODE = {"step_s": [0.1, 0.1, 0.2], "streams_step_s": [0.2, 0.4, 0.25], "read_bytes_per_s": [20e9, 20e9, 10e9]}


def row(context: int = 1000, **raw: list[float]) -> Row:
    return Row(context, invocation=5, step_bytes=10**9, raw=dict(raw))


def report(*rows: Row) -> Report:
    return Report(
        model={"name": "m", "dtype": "float32", "device": "cpu"},
        machine={
            "processor": "P [x]",
            "cores": 2,
            "threads": 2,
            "read_gb_per_s": 20.0,
            "gflop_per_s_float32": 100.0,
            "load_average": 0.1,
        },
        adapters={"alora": list("abcdef"), "random": 0, "rank": 16, "invocation_tokens": 5},
        rounds=3,
        left_out=[{"what": "all", "context": 9000, "reason": "it takes 9037 tokens"}],
        rows=list(rows),
    )


def test_figures_are_of_each_rounds_raw_measurements() -> None:
    found = row(**CALLS, **DECODE).figures()
    middle = {name: each["median"] for name, each in found.items()}
    rest = 15 * 0.1
    assert middle == pytest.approx(
        {
            "prefill_tokens_per_s": 1005 / 3,
            "step_ms": 100,
            "step_over_reading": 2,  # 0.1 s where 1 GB takes 0.05 s, in every round
            "streams_tokens_per_s": 8 / 0.25,
            "label_lora_ms": 3000,
            "label_alora_ms": 150,
            "label_ratio": 20,
            "label_bound": 30,
            "free_lora_ms": 5500,
            "free_alora_ms": 2000,
            "free_ratio": 2.5,
            "free_bound": (2 + rest) / (0.1 + rest),
            "fanout_ms": 300,
            "fanout_ratio": 2,
            "kv_ratio": 1.05,
        }
    )
    assert list(found) == [figure.name for figure in FIGURES]
    assert found["label_ratio"] == {"median": 20.0, "q1": 17.5, "q3": 25.0}
    shares = row(**CALLS, **DECODE).shares()
    assert shares == pytest.approx({"label": 20 / 30, "free": 2.5 / middle["free_bound"]})


def test_what_was_not_measured_is_no_figure() -> None:
    found = row(**CALLS).figures()
    assert {"step_ms", "step_over_reading", "streams_tokens_per_s", "free_bound"}.isdisjoint(found)
    assert row(**CALLS).shares().keys() == {"label"}
    assert row().figures() == {}
    one_more = row(**CALLS, step_s=[0.3], read_bytes_per_s=[20e9])
    assert one_more.figures()["step_ms"] == {"median": 300.0, "q1": 300.0, "q3": 300.0}


def test_only_whole_rounds_are_kept() -> None:
    kept = row()
    kept.add({"step_s": 0.1, "read_bytes_per_s": 20e9})
    kept.add({"step_s": 0.2, "read_bytes_per_s": 10e9})
    assert kept.raw == {"step_s": [0.1, 0.2], "read_bytes_per_s": [20e9, 10e9]}


def test_the_json_has_figures_and_raw_measurements() -> None:
    found = json.loads(json.dumps(report(row(**CALLS, **DECODE), row(2000)).as_dict()))
    assert list(found) == [
        "model",
        "machine",
        "adapters",
        "rounds",
        "ended_early",
        "warnings",
        "left_out",
        "rows",
    ]
    (only,) = found["rows"]
    assert list(only) == ["context", "invocation_tokens", "step_bytes", "figures", "share_of_bound", "raw"]
    assert only["raw"] == {**CALLS, **DECODE}
    assert found["ended_early"] is None


def shown(report: Report, width: int = 120) -> str:
    console = Console(width=width, highlight=False, no_color=True)
    with console.capture() as capture:
        for line in (*head(report), table(report), *warnings(report)):
            console.print(line)
    return capture.get()


def test_the_table_shows_quartiles_and_what_is_missing() -> None:
    text = shown(report(row(**CALLS, **DECODE), row(2000, **CALLS)))
    assert "20.0 (17.5–25.0)" in text
    assert "67%" in text
    assert "P [x], 2 cores" in text
    assert "6 of the library; rank 16" in text
    assert "all at 9000 tokens left out: it takes 9037 tokens" in text
    (streams,) = (line for line in text.splitlines() if "8 streams" in line)
    assert streams.split()[-1] == "–"
    assert len(text.splitlines()) < 35


def test_a_narrow_terminal_loses_no_digit() -> None:
    rows = [row(context, **CALLS, **DECODE) for context in (1000, 2000, 3000, 4000)]
    assert "…" not in shown(report(*rows), width=60)
    text = shown(report(*rows[:3]), width=80)
    assert "…" not in text
    assert text.count("(17.5–25.0)") == 3


def test_it_is_said_what_the_adapters_are_and_how_it_ended() -> None:
    found = report(row(**CALLS))
    found.adapters = {**found.adapters, "random": 6}
    assert "6 with random weights" in shown(found)
    found.adapters = {**found.adapters, "random": 2}
    assert "4 of the library, 2 random" in shown(found)
    found.ended = "interrupted"
    found.warnings = ["the machine was busy"]
    assert "ended early (interrupted)" in shown(found)
    assert "the machine was busy" in shown(found)


@pytest.mark.parametrize("rows", [[row(**CALLS, **DECODE), row(2000, **CALLS)], [row(**DECODE)], [row(**CALLS)], []])
def test_a_picture_of_whatever_was_measured(tmp_path: Path, rows: list[Row]) -> None:
    draw(tmp_path / "p.png", report(*rows))
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_that_cannot_be_drawn_is_refused_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"\.png"):
        check_plot(tmp_path / "p.jpg")
    check_plot(tmp_path / "p.png")
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"midstream\[eval\]"):
        check_plot(tmp_path / "p.png")


def test_the_documentation_shows_every_figure() -> None:
    text = (Path(__file__).parents[2] / "docs" / "bench.md").read_text(encoding="utf-8")
    assert [figure.label for figure in FIGURES if f"\n {figure.label}  " not in text] == []
