"""`midstream train` and its evaluation, from files to folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from midstream.errors import InputError
from midstream.models.chat import ChatTokenizer
from midstream.models.source import resolve
from midstream.training.base_kv import BaseKV
from midstream.training.data import (
    TASKS,
    Example,
    Task,
    encode,
    plain_task,
    read_histories,
    read_rows,
    sample,
    with_wrong_documents,
    within_histories,
)
from midstream.training.evaluate import Figures, by_group, positive_probabilities
from midstream.training.export import export
from midstream.training.trainer import TrainConfig, train


@dataclass(frozen=True, slots=True)
class DataConfig:
    """Which rows.

    `wrong_documents`: share of answerable rows that come again with another row's passages. `histories`: files whose
    questions, passages and answers become earlier turns of half of the rows, and plain questions of their own.
    """

    files: tuple[Path, ...]
    task: str
    max_rows: int | None = None
    max_prefix_tokens: int | None = None
    wrong_documents: float = 0.0
    histories: tuple[Path, ...] = ()
    invocation_text: str | None = None
    seed: int = 0


def load_examples(data: DataConfig, chat: ChatTokenizer) -> tuple[Task, list[Example]]:
    """Rows of the files as examples. Raises DataError with every bad row, InvocationError for an unstable one."""
    task = TASKS.get(data.task) or plain_task(data.task)
    rows = read_rows(data.files, task)
    if data.wrong_documents:
        rows = with_wrong_documents(rows, data.wrong_documents, data.seed)
    if data.histories:
        rows = within_histories(rows, read_histories(data.histories), 0.5, task.labels[-1], data.seed)
    examples = encode(rows, chat, data.invocation_text or task.invocation_text)
    picked = sample(examples, data.max_rows, data.max_prefix_tokens, data.seed)
    if len(picked) < 2:
        raise InputError(f"{len(picked)} rows are left after sampling: at least 2 are needed")
    return task, picked


def load_network(model: str, *, progress: bool = False) -> tuple[Any, ChatTokenizer]:
    """A base model for training, in float32 on the CPU and bfloat16 on CUDA."""
    folder = resolve(model, progress=progress)
    transformers_logging.disable_progress_bar()
    cuda = torch.cuda.is_available()
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16 if cuda else torch.float32)
    return network.to("cuda" if cuda else "cpu"), ChatTokenizer.from_folder(folder)


def run_training(
    model: str, data: DataConfig, config: TrainConfig, out: Path, run_folder: Path, *, progress: bool
) -> dict[str, Any]:
    """Train on the files and write the adapter's folder; returns what a report needs."""
    network, chat = load_network(model, progress=progress)
    task, examples = load_examples(data, chat)
    base_kv = BaseKV(network, model_key=model)
    result = train(network, examples, config, base_kv=base_kv, run_folder=run_folder, progress=progress)
    export(
        result.network,
        out,
        config,
        base_model=model,
        invocation=examples[0].invocation,
        invocation_text=data.invocation_text or task.invocation_text,
        labels=task.labels,
        max_tokens=max(len(e.target) for e in examples) + 4,
    )
    return {"rows": len(examples), "best_epoch": result.best_epoch, "history": list(result.history)}


def run_evaluation(model: str, data: DataConfig, adapters: Sequence[Path], *, progress: bool) -> dict[str, Figures]:
    """Figures of the prompted base model and of each adapter folder on the same rows."""
    from peft import LoraConfig, PeftModel

    network, chat = load_network(model, progress=progress)
    task, examples = load_examples(data, chat)
    if not task.labels:
        raise InputError(f"task {data.task} has no labels to evaluate")
    base_kv = BaseKV(network, model_key=model)
    labels = [chat.encode(label) for label in task.labels]
    shown = "base" if progress else ""
    asked = [replace(e, invocation=_question(chat, task)) for e in examples]
    report = {
        "base": by_group(
            positive_probabilities(network, asked, labels, base_kv, progress=shown), examples, task.labels[0]
        )
    }
    for folder in adapters:
        settings = LoraConfig.from_pretrained(folder)
        kv = base_kv if settings.alora_invocation_tokens else None
        # On top of the base model's KV every token is the adapter's own. PEFT's aLoRA layers would wait for offsets
        # that only its own forward gives them, and run the base model without a word.
        settings.alora_invocation_tokens = None
        wrapped = PeftModel.from_pretrained(network, folder, config=settings)
        wrapped.eval()
        shown = folder.name if progress else ""
        found = positive_probabilities(wrapped.get_base_model(), examples, labels, kv, progress=shown)
        report[folder.name] = by_group(found, examples, task.labels[0])
        network = wrapped.unload()
    return report


def _question(chat: ChatTokenizer, task: Task) -> tuple[int, ...]:
    return chat.encode(f"<|im_start|>user\n{task.question}<|im_end|>\n<|im_start|>assistant\n")
