"""The parity study's bookkeeping: what is run next, which runs count, and what the verdict says."""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmarks.parity import RANKS, RATES, SEEDS, TARGETS, Arm, _arms, _read, compare, plan, summarise, table

SIZE = {"rows": 160, "test_rows": 200, "epochs": 2}
TRUTH = [i % 2 for i in range(200)]


def make(arm: Arm, rate: float, seed: int, share_right: float, loss: float = 0.5) -> dict[str, Any]:
    right = np.random.default_rng(seed).random(200) < share_right
    chances = [0.9 if truth == hit else 0.1 for truth, hit in zip(TRUTH, right, strict=True)]
    own = {"task": "jailbreak", "kind": arm.kind, "rank": arm.rank, "targets": arm.targets, "rate": rate, "seed": seed}
    rest = {"size": SIZE, "train_rows": 160, "validation_loss": loss, "train_s": 1.0, "truth": TRUTH}
    return {**own, **rest, "chances": chances}


def study(shares: dict[str, float]) -> list[dict[str, Any]]:
    """All runs there are to make, in the order of the plan."""
    runs: list[dict[str, Any]] = []
    for arm, rate, seed in plan(lambda: runs, "jailbreak"):
        runs.append(make(arm, rate, seed, shares[arm.kind], 0.4 if rate == RATES[1] else 0.5))
    return runs


def test_the_plan_tunes_each_arm_at_the_first_seed_and_runs_the_better_rate_at_the_others() -> None:
    runs = study({"alora": 0.8, "lora": 0.8})
    arms = len(TARGETS) * sum(map(len, RANKS.values()))
    assert len(runs) == arms * (len(RATES) + len(SEEDS) - 1)
    later = {run["rate"] for run in runs if run["seed"] != SEEDS[0]}
    assert later == {RATES[1]}
    assert not list(plan(lambda: runs, "jailbreak"))
    assert len(list(itertools.islice(plan(lambda: runs[:-1], "jailbreak"), 1))) == 1


def test_a_verdict_needs_all_runs_and_says_what_they_show() -> None:
    runs = study({"alora": 0.8, "lora": 0.8})
    found = summarise(runs)["tasks"]["jailbreak"]
    assert found["difference"]["within_margin"]
    assert found["difference"]["value"] == 0.0
    assert found["difference"]["not_worse"]
    assert "jailbreak" in table(summarise(runs))
    assert "difference" not in summarise(runs[:-1])["tasks"]["jailbreak"]
    worse = summarise(study({"alora": 0.6, "lora": 0.9}))["tasks"]["jailbreak"]["difference"]
    assert not worse["within_margin"]
    assert not worse["not_worse"]


def test_a_difference_of_exactly_the_margin_is_within_it() -> None:
    one, other = (make(Arm(kind, 8, "attention"), 1e-3, 0, 1.0) for kind in ("alora", "lora"))
    one["chances"] = [1 - chance if i < 3 else chance for i, chance in enumerate(one["chances"])]
    assert compare([one], [other])["value"] == -0.015
    assert compare([one], [other])["within_margin"]


def test_runs_of_another_size_do_not_count_and_none_counts_twice(tmp_path: Path) -> None:
    run = make(Arm("lora", 8, "attention"), 1e-3, 0, 1.0)
    rows = [run, run, {**run, "size": {**SIZE, "rows": 32}, "seed": 1}]
    rows.append({**run, "size": {**SIZE, "dtype": "bfloat16"}, "seed": 2})
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = argparse.Namespace(runs=tmp_path / "runs.jsonl", dtype="float32", **SIZE)
    assert _read(arguments) == [run]


def test_some_of_the_arms_can_be_studied_alone() -> None:
    two = _arms("lora 32 all-linear,alora 32 all-linear")
    assert two == (Arm("lora", 32, "all-linear"), Arm("alora", 32, "all-linear"))
    runs = [make(arm, RATES[0], seed, 0.8) for arm in two for seed in SEEDS]
    runs += [make(arm, RATES[1], SEEDS[0], 0.8, loss=0.9) for arm in two]
    assert not list(plan(lambda: runs, "jailbreak", two))
    assert "difference" not in summarise(runs)["tasks"]["jailbreak"]
    assert summarise(runs, two)["tasks"]["jailbreak"]["best"] == {"lora": str(two[0]), "alora": str(two[1])}
    assert "difference" not in summarise(runs, two[:1])["tasks"]["jailbreak"]
    with pytest.raises(ValueError, match="lora 7 all-linear"):
        _arms("lora 7 all-linear")


@pytest.mark.parametrize("name", ["parity", "parity_800"])
def test_the_page_on_training_states_the_results(name: str) -> None:
    root = Path(__file__).parent.parent
    summary = json.loads((root / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    assert table(summary) in (root / "docs" / "train.md").read_text(encoding="utf-8")
