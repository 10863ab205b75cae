"""What the README shows is run as it stands."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_example_runs_and_calls_the_adapter() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len([line for line in example.splitlines() if line.strip()]) == 5
    done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.startswith("yes ")


def test_every_command_it_names_exists() -> None:
    verbs = set(re.findall(r"^midstream (\w+)", README, re.M))
    assert verbs == {
        "demo",
        "chat",
        "call",
        "complete",
        "adapters",
        "bench",
        "models",
        "train",
        "eval",
        "sample",
        "serve",
        "flow",
    }
    for verb in sorted(verbs):
        command = [sys.executable, "-m", "midstream.cli.main", verb, "--help"]
        assert subprocess.run(command, capture_output=True, check=False).returncode == 0, verb


@pytest.mark.parametrize("name", ["call", "fanout"])
def test_the_figures_it_states_are_those_of_the_results(name: str) -> None:
    rows = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))["rows"]
    stated = [line for line in README.splitlines() if line.startswith("| ")]
    for row in rows:
        length = f"{row['context']:,}"
        (line,) = [
            s
            for s in stated
            if re.match(rf"\| {length}( tokens| of| \|)", s) and ("tokens |" in s) == (name == "fanout")
        ]
        digits = 0 if name == "call" else 1
        assert f"| {row['ratio']:.{digits}f} |" in line, line


_FIGURES = ("s", "first_epoch_s", "peak_mb", "loss")


def test_the_training_figures_are_those_of_the_results() -> None:
    found = json.loads((ROOT / "benchmarks" / "results" / "train.json").read_text(encoding="utf-8"))
    assert found["ratio"] >= 5
    peft, ours = ({key: found[f"{side}_{key}"] for key in _FIGURES} for side in ("peft", "midstream"))
    for row in (
        f"| 3 epochs | {peft['s']:.1f} s | {ours['s']:.1f} s | {found['ratio']:.1f} |",
        f"| {peft['first_epoch_s']:.1f} s | {ours['first_epoch_s']:.1f} s | {found['ratio_first_epoch']:.1f} |",
        f"| peak memory | {peft['peak_mb']:,.0f} MB | {ours['peak_mb']:,.0f} MB | |",
        f"| {peft['loss']:.6f} | {ours['loss']:.6f} |",
    ):
        assert row in README, row


def test_the_servers_figures_are_those_of_the_results() -> None:
    added, soak = (
        json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("server", "soak")
    )
    outcomes = soak["outcomes"]
    assert set(outcomes) == {"finished", "left"}
    assert soak["kv_nodes_held_after"] == soak["kv_bytes_after_clearing"] == 0
    for stated in (
        f"| {added['added_first_ms']:.1f} ms |",
        f"| {100 * added['throughput_ratio']:.0f} % |",
        f"{outcomes['finished']} finished, {outcomes['left']} left",
        f"memory {100 * soak['rss_growth']:+.1f} %",
    ):
        assert stated in README, stated


def test_the_flows_figures_are_those_of_the_results() -> None:
    found = json.loads((ROOT / "benchmarks" / "results" / "flows.json").read_text(encoding="utf-8"))
    gain = found["grounded"]["strategies"]["hallucination"]["8"]["gain"]
    assert gain["low"] > 0
    seconds = {name: row["seconds"] for name, row in found["time"].items()}
    drawing = seconds["8 answers, not scored"]
    for stated in (
        f"n = {found['grounded']['n']}) | {gain['value']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}] |",
        f"| {seconds['best of 8'] - drawing:.1f} / {drawing:.1f} |",
        f"| {seconds['all']:.1f} / {seconds['base alone']:.1f} |",
    ):
        assert stated in README, stated


def test_the_turns_figures_are_those_of_the_results() -> None:
    found = json.loads((ROOT / "benchmarks" / "results" / "turn.json").read_text(encoding="utf-8"))
    assert found["ratio"] >= 4.5
    assert found["ratio_warm"] >= 2.5
    sides = {"alora": 1.0, "lora_cold": found["ratio"], "lora_warm": found["ratio_warm"], "peft": found["ratio_peft"]}
    for side, ratio in sides.items():
        times = "1" if side == "alora" else f"{ratio:.1f}"
        held = found["kv"][side]["end_bytes"] / 1e6
        stated = f"| {found[f'{side}_s']:.1f} | {times} | {held:,.0f} MB |"
        assert stated in README, stated


def test_the_plugins_figures_are_those_of_the_results() -> None:
    found = json.loads((ROOT / "benchmarks" / "results" / "vllm_reuse.json").read_text(encoding="utf-8"))
    for call in found["calls"]:
        times = f"{1e3 * call['lora_s']:,.0f} ms | {1e3 * call['alora_s']:,.0f} ms | {call['times_sooner']:.1f} |"
        assert f"| {call['tokens']:,} | {call['alora_cached']:,} | {times}" in README
        assert call["alora_cached"] == call["tokens"] // 32 * 32
        assert call["lora_cached"] == 0


def test_the_races_figures_are_those_of_the_results() -> None:
    found = json.loads((ROOT / "benchmarks" / "results" / "race.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    for side in found["sides"].values():
        hits = (f"{100 * side['hit_rate'][kind]:.0f} %" for kind in ("base", "adapters"))
        assert f"| {side['s']:.1f} s | {' | '.join(hits)} |" in page
    ratios = found["ratio"]
    assert (
        f"{ratios['embedded']['median']:.1f} times as fast on midstream and {ratios['vllm']['median']:.1f} times"
        in page
    )
