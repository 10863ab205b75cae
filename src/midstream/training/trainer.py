"""Training an adapter: the loop over epochs, with validation, early stopping and resumable checkpoints."""

from __future__ import annotations

import csv
import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from midstream.errors import InputError
from midstream.training.base_kv import BaseKV
from midstream.training.data import Example
from midstream.training.losses import batch_loss

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """How to train. `learning_rate` is AdamW's peak; it warms up linearly over `warmup` of the steps, then decays."""

    kind: Literal["alora", "lora"] = "alora"
    rank: int = 16
    alpha: int = 32
    targets: tuple[str, ...] = TARGETS
    learning_rate: float = 5e-4
    epochs: int = 3
    batch_size: int = 16
    warmup: float = 0.1
    weight_decay: float = 0.0
    validation: float = 0.1
    patience: int = 2
    seed: int = 0


@dataclass(frozen=True, slots=True)
class TrainResult:
    """The network with the best epoch's adapter active, and the losses of each epoch."""

    network: Any
    best_epoch: int
    history: tuple[dict[str, float], ...]


def train(
    model: Any,
    examples: Sequence[Example],
    config: TrainConfig,
    *,
    base_kv: BaseKV | None,
    run_folder: Path,
    progress: bool = False,
) -> TrainResult:
    """Train an adapter on `model` (its weights stay as they are). Resumes from `run_folder` after a kill.

    All of an aLoRA's trained tokens are its own, so on top of the base model's KV it trains as a plain LoRA.
    """
    return _Run(model, examples, config, base_kv if config.kind == "alora" else None, run_folder, progress).run()


class _Run:
    def __init__(
        self,
        model: Any,
        examples: Sequence[Example],
        config: TrainConfig,
        base_kv: BaseKV | None,
        folder: Path,
        progress: bool,
    ) -> None:
        torch.manual_seed(config.seed)
        self.config = config
        self.settings = {**asdict(config), "rows": _digest(examples)}
        self.base_kv = base_kv
        self.folder = folder
        self.progress = progress
        held_out = max(1, int(len(examples) * config.validation))
        self.validation, self.training = list(examples[:held_out]), list(examples[held_out:])
        lora = LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            target_modules=list(config.targets),
            lora_dropout=0.0,
            task_type="CAUSAL_LM",
        )
        self.peft = get_peft_model(model, lora)
        self.network = self.peft.get_base_model()
        parameters = [p for p in self.peft.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
        self.steps = config.epochs * math.ceil(len(self.training) / config.batch_size)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)
        self.best: dict[str, Tensor] = {}
        self.history: list[dict[str, float]] = []

    def run(self) -> TrainResult:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._resume()
        with _bar(self.progress) as bar:
            while len(self.history) < self.config.epochs and not self._exhausted():
                epoch = len(self.history)
                train_loss = self._epoch(epoch, bar)
                entry = {"epoch": epoch, "train_loss": train_loss, "validation_loss": self._validate(bar)}
                if not self.history or entry["validation_loss"] < self._best_loss():
                    self.best = {k: v.clone() for k, v in get_peft_model_state_dict(self.peft).items()}
                self.history.append(entry)
                self._checkpoint()
        set_peft_model_state_dict(self.peft, self.best)
        return TrainResult(self.peft, self._best_epoch(), tuple(self.history))

    def _rate(self, step: int) -> float:
        warm = max(1, int(self.steps * self.config.warmup))
        if step < warm:
            return (step + 1) / warm
        return max(0.02, (self.steps - step) / max(1, self.steps - warm))

    def _epoch(self, epoch: int, bar: Progress) -> float:
        batches = _batches(self.training, self.config.batch_size, self.config.seed + epoch)
        self.peft.train()
        total = 0.0
        for batch in bar.track(batches, description=f"epoch {epoch + 1}/{self.config.epochs}"):
            loss = batch_loss(self.network, batch, self.base_kv)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.peft.parameters(), 1.0)
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
            total += float(loss.detach()) * len(batch)
        return total / len(self.training)

    @torch.no_grad()
    def _validate(self, bar: Progress) -> float:
        self.peft.eval()
        batches = _batches(self.validation, self.config.batch_size, None)
        losses = [
            float(batch_loss(self.network, batch, self.base_kv)) * len(batch)
            for batch in bar.track(batches, description="validation")
        ]
        return sum(losses) / len(self.validation)

    def _best_loss(self) -> float:
        return min(entry["validation_loss"] for entry in self.history)

    def _best_epoch(self) -> int:
        return min(range(len(self.history)), key=lambda i: self.history[i]["validation_loss"])

    def _exhausted(self) -> bool:
        return bool(self.history) and len(self.history) - 1 - self._best_epoch() >= self.config.patience

    def _checkpoint(self) -> None:
        """Written beside and renamed, so that a kill leaves the last whole one."""
        part = self.folder / "checkpoint.part"
        torch.save(
            {
                "config": self.settings,
                "adapter": get_peft_model_state_dict(self.peft),
                "best": self.best,
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "history": self.history,
            },
            part,
        )
        part.rename(self.folder / "checkpoint.pt")
        with (self.folder / "loss.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["epoch", "train_loss", "validation_loss"])
            writer.writeheader()
            writer.writerows(self.history)

    def _resume(self) -> None:
        path = self.folder / "checkpoint.pt"
        if not path.is_file():
            return
        state = torch.load(path, weights_only=True)
        if state["config"] != self.settings:
            raise InputError(f"{path} was made with other settings or rows: use another run folder, or remove it")
        set_peft_model_state_dict(self.peft, state["adapter"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.best, self.history = state["best"], state["history"]


def _digest(examples: Sequence[Example]) -> str:
    """Content hash (hex) of the examples in their order: a run on other rows must not resume from this one."""
    return hashlib.sha256(repr([astuple(example) for example in examples]).encode()).hexdigest()


def _batches(examples: list[Example], size: int, seed: int | None) -> list[list[Example]]:
    """Examples of like length together (padding costs time); the order of the batches is the seed's."""
    order = sorted(examples, key=lambda e: len(e.prefix))
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    if seed is not None:
        random.Random(seed).shuffle(batches)
    return batches


def _bar(shown: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not shown)
