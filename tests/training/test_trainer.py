"""The training loop: it learns, stops and goes on after a kill at any step, and the best epoch is what is kept."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

from midstream.errors import InputError
from midstream.training import trainer
from midstream.training.base_kv import BaseKV
from midstream.training.data import Example
from midstream.training.trainer import TrainConfig, train
from tests.helpers import tiny_llama

INVOCATION = (256, 71)
EXAMPLES = [
    Example(tuple((i * 7 + j) % 200 for j in range(4 + i % 5)), INVOCATION, (90 + i % 2, 95), "g", str(i % 2))
    for i in range(24)
]


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(**{"rank": 4, "epochs": 3, "batch_size": 6, "learning_rate": 5e-3, **changes})


def weights(result: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in result.network.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", ["alora", "lora"])
def test_it_learns_and_reads_each_prefix_once(kind: str, tmp_path: Path) -> None:
    model = tiny_llama()
    kv = BaseKV(model)
    result = train(model, EXAMPLES, config(kind=kind), base_kv=kv, run_folder=tmp_path)
    losses = [entry["train_loss"] for entry in result.history]
    assert losses[-1] < losses[0]
    assert kv.computed_tokens == (sum(map(len, {e.prefix for e in EXAMPLES})) if kind == "alora" else 0)


@pytest.mark.parametrize("killed_at", [1, 4, 6, 11])
def test_a_run_killed_at_any_step_goes_on_to_the_same_bits(
    killed_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within an epoch, at its end, and before anything was saved; with dropout, whose draws must go on too."""

    def run(folder: str, examples: list[Example] = EXAMPLES, **changes: Any) -> Any:
        model = tiny_llama()
        settings = config(dropout=0.1, **changes)
        folder_path = tmp_path / folder
        return train(model, examples, settings, base_kv=BaseKV(model), run_folder=folder_path, checkpoint_seconds=0.0)

    whole = run("whole")
    step, done = trainer._Run._step, []

    def die(self: Any, batch: Any) -> None:
        if len(done) == killed_at:
            raise KeyboardInterrupt
        step(self, batch)
        done.append(1)

    monkeypatch.setattr(trainer._Run, "_step", die)
    with pytest.raises(KeyboardInterrupt):
        run("killed")
    monkeypatch.setattr(trainer._Run, "_step", step)
    resumed = run("killed")
    assert weights(whole).keys() == weights(resumed).keys()
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name])
    assert whole.history == resumed.history
    assert (tmp_path / "whole" / "loss.csv").read_text() == (tmp_path / "killed" / "loss.csv").read_text()
    with pytest.raises(InputError, match="other settings"):
        run("killed", rank=2)
    with pytest.raises(InputError, match="rows"):
        run("killed", EXAMPLES[:10])


def test_the_best_epoch_is_kept_and_not_the_last(tmp_path: Path) -> None:
    """Fault 12: a rate that wrecks the adapter after the first epoch must not be exported."""
    model = tiny_llama()
    settings = config(learning_rate=1.0, epochs=4, patience=9)
    result = train(model, EXAMPLES, settings, base_kv=BaseKV(model), run_folder=tmp_path)
    losses = [entry["validation_loss"] for entry in result.history]
    assert result.best_epoch == losses.index(min(losses))
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    held = {n: p for n, p in result.network.named_parameters() if p.requires_grad}
    for name, value in state["best"].items():
        assert torch.equal(held[name.replace(".weight", ".default.weight")], value)


def test_a_run_that_diverges_exports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer._Run, "_validate", lambda self: float("nan"))
    model = tiny_llama()
    with pytest.raises(InputError, match="diverged in epoch 1"):
        train(model, EXAMPLES, config(), base_kv=BaseKV(model), run_folder=tmp_path)


def test_a_run_folder_of_another_base_model_is_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    train(model, EXAMPLES, config(epochs=1), base_kv=BaseKV(model), run_folder=tmp_path)
    other = tiny_llama(seed=1)
    with pytest.raises(InputError, match="other settings"):
        train(other, EXAMPLES, config(epochs=1), base_kv=BaseKV(other), run_folder=tmp_path)


def test_it_stops_when_validation_does_not_get_better(tmp_path: Path) -> None:
    model = tiny_llama()
    settings = config(learning_rate=0.0, epochs=9, patience=2)
    result = train(model, EXAMPLES, settings, base_kv=BaseKV(model), run_folder=tmp_path)
    assert len(result.history) == 3


def test_losses_are_a_table_and_a_picture(tmp_path: Path) -> None:
    model = tiny_llama()
    result = train(model, EXAMPLES, config(epochs=2), base_kv=BaseKV(model), run_folder=tmp_path)
    with (tmp_path / "loss.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, 9))
    assert [row["validation_loss"] != "" for row in rows] == [False, False, False, True] * 2
    assert float(rows[-1]["validation_loss"]) == result.history[-1]["validation_loss"]
    rates = [float(row["learning_rate"]) for row in rows]
    assert max(rates) == pytest.approx(5e-3)
    assert rates[-1] < rates[1]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_too_few_rows_are_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    with pytest.raises(InputError, match="at least 2"):
        train(model, EXAMPLES[:1], config(), base_kv=BaseKV(model), run_folder=tmp_path)


def test_gradient_checkpointing_and_bfloat16_train(tmp_path: Path) -> None:
    model = tiny_llama().to(torch.bfloat16)
    settings = config(gradient_checkpointing=True, epochs=6)
    result = train(model, EXAMPLES, settings, base_kv=BaseKV(model), run_folder=tmp_path)
    losses = [entry["train_loss"] for entry in result.history]
    assert losses[-1] < losses[0]
