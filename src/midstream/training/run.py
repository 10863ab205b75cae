"""`midstream train` from files to an adapter's folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from midstream.errors import InputError
from midstream.models.chat import ChatTokenizer
from midstream.models.source import cache_folder, resolve
from midstream.training.augment import read_histories, with_wrong_documents, within_histories
from midstream.training.base_kv import BaseKV
from midstream.training.card import Training, write_card
from midstream.training.data import Example, encode, propose_invocation, sample
from midstream.training.export import export
from midstream.training.plain import plain_task
from midstream.training.sources import count_sources
from midstream.training.tasks import TASKS, Row, Task, read_rows
from midstream.training.trainer import TrainConfig, train


@dataclass(frozen=True, slots=True)
class DataConfig:
    """Which rows.

    `wrong_documents`: share of positive rows that come again with another row's passages. `histories`: files whose
    questions, passages and answers become earlier turns of half of the rows, and plain questions of their own.
    Without an `invocation_text` one is proposed. `instruction` and `positive` (the label in front) are for tasks of
    the user's own.
    """

    files: tuple[Path, ...]
    task: str
    max_rows: int | None = None
    max_prefix_tokens: int | None = None
    wrong_documents: float = 0.0
    histories: tuple[Path, ...] = ()
    invocation_text: str | None = None
    instruction: str | None = None
    positive: str | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Budget:
    """How much KV of prefixes is kept: bytes of memory, then bytes of disk, below the user's cache folder."""

    memory_bytes: int = 4 * 1024**3
    disk_bytes: int = 4 * 1024**3


@dataclass(frozen=True, slots=True)
class Prepared:
    """Rows that are ready to train on."""

    task: Task
    rows: Sequence[Row] = field(repr=False)
    left_out: int
    too_long: int
    examples: Sequence[Example] = field(repr=False)
    invocation_text: str


def load_examples(data: DataConfig, chat: ChatTokenizer) -> Prepared:
    """Rows of the files as examples. Raises DataError with every bad row, InvocationError when none can be found."""
    task = TASKS.get(data.task)
    if task is not None and (data.instruction is not None or data.positive is not None):
        raise InputError(f"{data.task} is a known task: its instruction and its labels are what they are")
    if task is None:
        task = plain_task(data.task, data.files, instruction=data.instruction, positive=data.positive)
    rows, left_out = read_rows(data.files, task)
    rows = _augmented(rows, task, data)
    text = data.invocation_text or propose_invocation(rows, task, chat)
    examples = encode(rows, task, chat, text)
    longest = data.max_prefix_tokens
    too_long = sum(longest is not None and len(example.prefix) > longest for example in examples)
    return Prepared(task, rows, left_out, too_long, sample(examples, data.max_rows, longest, data.seed), text)


def _augmented(rows: list[Row], task: Task, data: DataConfig) -> list[Row]:
    known = data.task in TASKS or data.positive is not None
    if data.wrong_documents:
        if len(task.labels) != 2 or not known or not any(row.chat.documents for row in rows):
            raise InputError(
                "wrong documents make a row negative: that needs rows with documents and two labels, and for a task of "
                "your own --positive to say which is which"
            )
        rows = with_wrong_documents(rows, data.wrong_documents, task.labels, data.seed)
    if data.histories:
        if data.task != "jailbreak" and data.positive is None:
            raise InputError(
                "histories add plain questions as negative rows: that is for jailbreak, or needs --positive"
            )
        rows = within_histories(rows, read_histories(data.histories), 0.5, task.labels[-1], data.seed)
    return rows


def _longest_answer(ready: Prepared, chat: ChatTokenizer) -> int:
    """Tokens that an answer may have: the longest label's, or half as many again as the longest text there was."""
    labels = [len(chat.encode(ready.task.answer(option))) for option in ready.task.options]
    return max(labels, default=max(len(e.target) for e in ready.examples) * 3 // 2) + 2


def load_network(model: str, *, dtype: str | None = None, progress: bool = False) -> tuple[Any, ChatTokenizer]:
    """A base model for training; without a `dtype`, in float32 on the CPU and bfloat16 on CUDA."""
    folder = resolve(model, progress=progress)
    transformers_logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = dtype or {"cuda": "bfloat16", "cpu": "float32"}[device]
    if chosen not in ("float32", "bfloat16"):
        raise InputError(f"--dtype is float32 or bfloat16, not {chosen}")
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, chosen))
    return network.to(device), ChatTokenizer.from_folder(folder)


def run_training(
    model: str,
    data: DataConfig,
    config: TrainConfig,
    out: Path,
    run_folder: Path,
    *,
    dtype: str | None = None,
    budget: Budget | None = None,
    arguments: Sequence[str] = (),
    progress: bool = False,
) -> dict[str, Any]:
    """Train on the files and write the adapter's folder; returns what a report needs.

    `arguments` are those of the command line, for the card.
    """
    network, chat = load_network(model, dtype=dtype, progress=progress)
    ready = load_examples(data, chat)
    budget = budget or Budget()
    folder = cache_folder() / "kv" if budget.disk_bytes else None
    base_kv = BaseKV(network, memory_bytes=budget.memory_bytes, folder=folder, disk_bytes=budget.disk_bytes)
    result = train(network, ready.examples, config, base_kv=base_kv, run_folder=run_folder, progress=progress)
    done = Training(
        model,
        (*data.files, *data.histories),
        count_sources(ready.rows),
        len(ready.examples),
        ready.left_out,
        ready.too_long,
        result.history,
        result.best_epoch,
        arguments,
    )
    export(
        result.network,
        out,
        config,
        base_model=model,
        task=ready.task,
        invocation=ready.examples[0].invocation,
        invocation_text=ready.invocation_text,
        max_tokens=_longest_answer(ready, chat),
        card=write_card(ready.task, config, ready.invocation_text, done),
    )
    return {
        "adapter": str(out),
        "invocation": ready.invocation_text,
        "invocation_tokens": list(ready.examples[0].invocation),
        "rows": len(ready.examples),
        "rows_left_out": ready.left_out,
        "rows_too_long": ready.too_long,
        "best_epoch": result.best_epoch + 1,
        "history": list(result.history),
        "prefix_tokens_computed": base_kv.computed_tokens,
    }
