"""Training an adapter: the loop over steps, with validation, early stopping and resumable checkpoints."""

from __future__ import annotations

import hashlib
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from midstream.errors import InputError
from midstream.training.base_kv import BaseKV, model_digest
from midstream.training.checkpoint import LossRow, draw_losses, load_checkpoint, save_checkpoint, write_losses
from midstream.training.data import Example
from midstream.training.losses import batch_loss
from midstream.training.prefix_attention import prefix_attention
from midstream.training.prefix_cache import use_gradient_checkpointing

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_LINEAR = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """How to train. `learning_rate` is AdamW's peak; it warms up linearly over `warmup` of the steps, then decays.

    `validation` is the share of the rows held out; training stops after `patience` epochs without a better loss there.
    """

    kind: Literal["alora", "lora"] = "alora"
    rank: int = 16
    alpha: int = 32
    targets: tuple[str, ...] = ALL_LINEAR
    dropout: float = 0.0
    learning_rate: float = 5e-4
    epochs: int = 3
    batch_size: int = 16
    warmup: float = 0.1
    weight_decay: float = 0.0
    validation: float = 0.1
    patience: int = 2
    gradient_checkpointing: bool = False
    seed: int = 0


@dataclass(frozen=True, slots=True)
class TrainResult:
    """The network with the best epoch's adapter active, and each epoch's training and validation loss."""

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
    checkpoint_seconds: float = 60.0,
    on_epoch: Callable[[dict[str, float]], None] = lambda entry: None,
) -> TrainResult:
    """Train an adapter on `model` (its weights stay as they are), going on from `run_folder` after a kill.

    All of an aLoRA's trained tokens are its own, so on top of the base model's KV it trains as a plain LoRA. A run that
    was killed and goes on gives what it would have given, to the bit, as long as the KV fits the budget of `base_kv`.
    `on_epoch` is called with each epoch's losses.
    Raises InputError when the rows are too few or `run_folder` is another run's.
    """
    if len(examples) < 2:
        raise InputError(f"{len(examples)} rows: at least 2 are needed, one to learn from and one to validate on")
    run = _Run(model, examples, config, base_kv if config.kind == "alora" else None, run_folder)
    with _bar(progress) as bar, prefix_attention(run.network):
        return run.run(bar, checkpoint_seconds, on_epoch)


class _Run:
    def __init__(
        self, model: Any, examples: Sequence[Example], config: TrainConfig, base_kv: BaseKV | None, folder: Path
    ) -> None:
        torch.manual_seed(config.seed)
        self.config = config
        digest = model_digest(model) if base_kv is None else base_kv.model_digest
        self.settings = {**asdict(config), "model": digest, "rows": _digest(examples)}
        self.base_kv = base_kv
        self.folder = folder
        held_out = max(1, int(len(examples) * config.validation))
        self.validation, self.training = list(examples[:held_out]), list(examples[held_out:])
        self.peft = get_peft_model(model, _lora(config))
        self.network = self.peft.get_base_model()
        if config.gradient_checkpointing:
            use_gradient_checkpointing(self.network)
        parameters = [p for p in self.peft.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        self.steps_per_epoch = math.ceil(len(self.training) / config.batch_size)
        self.steps = config.epochs * self.steps_per_epoch
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: rate_factor(step, self.steps, config.warmup)
        )
        self.best: dict[str, Tensor] = {}
        self.history: list[dict[str, float]] = []
        self.losses: list[LossRow] = []

    def run(
        self, bar: Progress, checkpoint_seconds: float, on_epoch: Callable[[dict[str, float]], None]
    ) -> TrainResult:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._resume()
        if self.base_kv is not None:
            prefixes = {e.prefix for e in (*self.training, *self.validation)}
            task = bar.add_task("prefixes", total=len(prefixes))
            self.base_kv.prepare(prefixes, lambda done: bar.advance(task, done))
        task = bar.add_task("training", total=self.steps, completed=len(self.losses))
        saved = time.monotonic()
        while not self._finished():
            for batch in self._batches_left():
                self._step(batch)
                bar.advance(task)
                if time.monotonic() - saved >= checkpoint_seconds:
                    self._save()
                    saved = time.monotonic()
            self._end_epoch()
            bar.update(task, description=f"validation loss {self.history[-1]['validation_loss']:.4f}")
            self._save()
            on_epoch(self.history[-1])
        draw_losses(self.folder, self.losses)
        set_peft_model_state_dict(self.peft, self.best)
        self.peft.eval()
        return TrainResult(self.peft, self._best_epoch(), tuple(self.history))

    def _finished(self) -> bool:
        epochs = len(self.history)
        return epochs >= self.config.epochs or (epochs > 0 and epochs - 1 - self._best_epoch() >= self.config.patience)

    def _batches_left(self) -> list[list[Example]]:
        """The batches of this epoch that have not been trained on: all of them, unless the run was resumed in it."""
        epoch = len(self.history)
        batches = epoch_batches(self.training, self.config.batch_size, self.config.seed + epoch)
        return batches[len(self.losses) - epoch * self.steps_per_epoch :]

    def _step(self, batch: Sequence[Example]) -> None:
        self.peft.train()
        rate = float(self.scheduler.get_last_lr()[0])
        loss = batch_loss(self.network, batch, self.base_kv)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.peft.parameters(), 1.0)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.losses.append(
            {
                "step": len(self.losses) + 1,
                "epoch": len(self.history) + 1,
                "learning_rate": rate,
                "train_loss": float(loss.detach()),
                "validation_loss": None,
            }
        )

    def _end_epoch(self) -> None:
        done = self.losses[len(self.history) * self.steps_per_epoch :]
        train_loss = sum(float(row["train_loss"] or 0.0) for row in done) / len(done)
        entry = {"epoch": len(self.history) + 1, "train_loss": train_loss, "validation_loss": self._validate()}
        if not math.isfinite(entry["validation_loss"]):
            raise InputError(
                f"training diverged in epoch {entry['epoch']} (validation loss {entry['validation_loss']}): "
                "nothing is exported; try a lower learning rate in another run folder"
            )
        if not self.history or entry["validation_loss"] < self._best_loss():
            self.best = {k: v.clone() for k, v in get_peft_model_state_dict(self.peft).items()}
        self.history.append(entry)
        self.losses[-1]["validation_loss"] = entry["validation_loss"]
        write_losses(self.folder, self.losses)

    @torch.no_grad()
    def _validate(self) -> float:
        self.peft.eval()
        batches = epoch_batches(self.validation, self.config.batch_size, None)
        losses = [float(batch_loss(self.network, batch, self.base_kv)) * len(batch) for batch in batches]
        return sum(losses) / len(self.validation)

    def _best_loss(self) -> float:
        return min(entry["validation_loss"] for entry in self.history)

    def _best_epoch(self) -> int:
        return min(range(len(self.history)), key=lambda i: self.history[i]["validation_loss"])

    def _save(self) -> None:
        state = {
            "settings": self.settings,
            "adapter": get_peft_model_state_dict(self.peft),
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "history": self.history,
            "losses": self.losses,
        }
        save_checkpoint(self.folder, state)

    def _resume(self) -> None:
        state = load_checkpoint(self.folder, self.settings)
        if state is None:
            return
        set_peft_model_state_dict(self.peft, state["adapter"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["random"])
        if state["random_cuda"]:
            torch.cuda.set_rng_state_all(state["random_cuda"])
        self.best, self.history, self.losses = state["best"], state["history"], state["losses"]


def rate_factor(step: int, steps: int, warmup: float) -> float:
    """The learning rate of a step as a share of its peak: linear warm-up over a share of all steps, linear decay."""
    warm = max(1, int(steps * warmup))
    if step < warm:
        return (step + 1) / warm
    return max(0.02, (steps - step) / max(1, steps - warm))


def _lora(config: TrainConfig) -> LoraConfig:
    return LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=list(config.targets),
        lora_dropout=config.dropout,
        task_type="CAUSAL_LM",
    )


def _digest(examples: Sequence[Example]) -> str:
    """Content hash (hex) of the examples in their order: a run on other rows must not resume from this one."""
    return hashlib.sha256(repr([astuple(example) for example in examples]).encode()).hexdigest()


def epoch_batches(examples: list[Example], size: int, seed: int | None) -> list[list[Example]]:
    """Examples of like length together (padding costs time); the order of the batches is the seed's."""
    order = sorted(examples, key=lambda e: len(e.prefix))
    if seed is not None:
        # Other neighbours among like ones each epoch: a rank of jittered lengths.
        rng = random.Random(seed)
        order = sorted(examples, key=lambda e: len(e.prefix) * rng.uniform(0.9, 1.1))
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    if seed is not None:
        random.Random(seed).shuffle(batches)
    return batches


def _bar(shown: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=not shown)
