"""Training one aLoRA: PEFT's own way (transformers' Trainer on whole conversations) against midstream's, alike.

Same rows, batches, epochs, learning rate and initial adapter on both sides; the final validation loss of both is of
one and the same function. Each side of each round is a process of its own, so that its peak memory is its own too; the
times are those of the training alone, without start-up.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback, TrainingArguments

from benchmarks.common import machine, spread, write
from midstream.models.chat import ChatTokenizer
from midstream.models.source import DEFAULT_MODEL
from midstream.training.base_kv import BaseKV
from midstream.training.data import Example
from midstream.training.losses import batch_loss
from midstream.training.run import load_network
from midstream.training.trainer import ALL_LINEAR, TrainConfig, epoch_batches, rate_factor, train

RANK, RATE, WARMUP, HELD_OUT = 16, 5e-4, 0.1, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefix", type=int, default=512, help="tokens before the invocation")
    parser.add_argument("--rows", type=int, default=12, help="to train on")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--side", choices=("peft", "midstream"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps({"peft": run_peft, "midstream": run_midstream}[arguments.side](arguments)))
        return
    raw: dict[str, list[dict[str, Any]]] = {"peft": [], "midstream": []}
    for _ in range(arguments.rounds):
        for side, results in raw.items():
            results.append(in_process(side, arguments))
            print(side, results[-1], file=sys.stderr, flush=True)
    write(arguments.json, report(raw, arguments))


def in_process(side: str, arguments: argparse.Namespace) -> dict[str, Any]:
    options = [f"--{name}={getattr(arguments, name)}" for name in ("prefix", "rows", "batch", "epochs")]
    command = [sys.executable, "-m", "benchmarks.train", f"--side={side}", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def report(raw: dict[str, list[dict[str, Any]]], arguments: argparse.Namespace) -> dict[str, Any]:
    def median(side: str, what: str) -> float:
        return statistics.median(result[what] for result in raw[side])

    figures = {
        f"{side}_{what}": median(side, what) for what in ("s", "first_epoch_s", "loss", "peak_mb") for side in raw
    }
    return {
        **figures,
        "ratio": figures["peft_s"] / figures["midstream_s"],
        "ratio_first_epoch": figures["peft_first_epoch_s"] / figures["midstream_first_epoch_s"],
        "spread": {side: spread([result["s"] for result in results]) for side, results in raw.items()},
        "raw": raw,
        "settings": {k: getattr(arguments, k) for k in ("prefix", "rows", "batch", "epochs", "rounds")},
        "machine": machine(),
    }


def run_peft(arguments: argparse.Namespace) -> dict[str, Any]:
    """transformers' Trainer on a PEFT aLoRA, as PEFT's documentation has it; batches in the order of the other side."""
    network, chat = load_network(DEFAULT_MODEL)
    held_out, training = make_examples(chat, arguments)
    torch.manual_seed(0)
    peft = get_peft_model(network, lora(training[0].invocation))
    order = [e for n in range(arguments.epochs) for batch in epoch_batches(training, arguments.batch, n) for e in batch]
    optimizer = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    steps = len(order) // arguments.batch
    watch = _FirstEpoch(steps // arguments.epochs)
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=arguments.batch,
            num_train_epochs=1,  # the rows of all epochs come one after the other
            train_sampling_strategy="sequential",
            max_grad_norm=1.0,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(
            peft,
            settings,
            train_dataset=list(map(as_row, order)),
            data_collator=collate,
            callbacks=[watch],
            optimizers=(optimizer, LambdaLR(optimizer, lambda step: rate_factor(step, steps, WARMUP))),
        )
        watch.started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - watch.started
    return result(seconds, watch.seconds, get_peft_model_state_dict(peft), held_out)


def run_midstream(arguments: argparse.Namespace) -> dict[str, Any]:
    """This package's trainer. Its time includes the KV of the prefixes, one row's validation, and checkpoints."""
    network, chat = load_network(DEFAULT_MODEL)
    held_out, training = make_examples(chat, arguments)
    config = TrainConfig(
        rank=RANK,
        alpha=2 * RANK,
        learning_rate=RATE,
        epochs=arguments.epochs,
        batch_size=arguments.batch,
        warmup=WARMUP,
        validation=0.0,  # one row, the least there is: the other side validates on none
        patience=arguments.epochs,
    )
    ends: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        train(
            network,
            [held_out[0], *training],
            config,
            base_kv=BaseKV(network),
            run_folder=Path(folder),
            on_epoch=lambda entry: ends.append(time.perf_counter() - started),
        )
        last = torch.load(Path(folder) / "checkpoint.pt", weights_only=True)["adapter"]
    return result(ends[-1], ends[0], last, held_out)


def result(seconds: float, first_epoch: float, adapter: dict[str, Any], held_out: list[Example]) -> dict[str, Any]:
    """A side's figures. The loss is that of the last step's adapter, computed alike for both."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    network, _ = load_network(DEFAULT_MODEL)
    plain = get_peft_model(network, lora(None))
    set_peft_model_state_dict(plain, adapter)
    with torch.no_grad():
        loss = float(batch_loss(plain.get_base_model().eval(), held_out, BaseKV(network)))
    return {"s": seconds, "first_epoch_s": first_epoch, "loss": loss, "peak_mb": peak}


def lora(invocation: Sequence[int] | None) -> LoraConfig:
    return LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules=list(ALL_LINEAR),
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
        alora_invocation_tokens=None if invocation is None else list(invocation),
    )


def make_examples(chat: ChatTokenizer, arguments: argparse.Namespace) -> tuple[list[Example], list[Example]]:
    """Rows to hold out and to train on: is the last sentence one of the passages above it?"""
    content = json.loads((files("midstream") / "data" / "demo_chat.json").read_text(encoding="utf-8"))
    texts = [d["text"] for turn in content["turns"] for d in turn["documents"]]
    sentences = [s.strip() for text in texts for s in text.split(". ") if 6 <= len(s.split()) <= 30]
    rng = random.Random(0)
    head, tail = chat.encode("<|im_start|>user\n"), chat.encode("<|im_end|>\n")
    examples: list[Example] = []
    for number in range(HELD_OUT + arguments.rows):
        rng.shuffle(sentences)
        asked, others = sentences[0], sentences[1:]
        answer = "yes" if number % 2 else "no"
        body = chat.encode(". ".join([asked, *others] if answer == "yes" else others))
        question = chat.encode(f"\n\nIs this above? {asked}")
        room = arguments.prefix - len(head) - len(tail) - len(question)
        body = (body * (room // len(body) + 1))[:room]
        prefix = (*head, *body, *question, *tail)
        examples.append(Example(prefix, chat.encode("<|im_start|>above\n"), chat.encode(f'"{answer}"')))
    return examples[:HELD_OUT], examples[HELD_OUT:]


def as_row(example: Example) -> dict[str, list[int]]:
    ids = [*example.prefix, *example.invocation, *example.target]
    return {"input_ids": ids, "labels": [-100] * (len(ids) - len(example.target)) + list(example.target)}


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """All rows are of one length."""
    batch = {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}
    return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}


class _FirstEpoch(TrainerCallback):
    """Notes how long the first epoch took."""

    def __init__(self, steps: int) -> None:
        self.steps, self.started, self.seconds = steps, 0.0, 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.steps:
            self.seconds = time.perf_counter() - self.started


if __name__ == "__main__":
    main()
