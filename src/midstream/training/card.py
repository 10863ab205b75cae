"""The model card of a trained adapter: what it does, what it was trained on, and the command that makes it again."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from midstream.training.sources import Source
from midstream.training.tasks import Task
from midstream.training.trainer import TrainConfig

FIGURES_START, FIGURES_END = "<!-- figures -->", "<!-- end of figures -->"


@dataclass(frozen=True, slots=True)
class Training:
    """What a run was, for its card.

    `rows`: trained on and validated on; `left_out`: rows of another question; `too_long`: rows over the longest prefix.
    """

    base_model: str
    files: tuple[Path, ...]
    sources: Sequence[tuple[Source, int]]
    rows: int
    left_out: int
    too_long: int
    history: Sequence[Mapping[str, float]]
    best_epoch: int
    arguments: Sequence[str]


def write_card(task: Task, config: TrainConfig, invocation_text: str, training: Training) -> str:
    """The card as Markdown with the front matter that model hubs read. Figures are added by `midstream eval --card`."""
    kind = "activated LoRA (aLoRA)" if config.kind == "alora" else "plain LoRA"
    licences = sorted({each for source, _ in training.sources for each in source.licence.split(", ")})
    front: dict[str, Any] = {
        "base_model": training.base_model,
        "library_name": "peft",
        "tags": ["lora", *(["alora"] if config.kind == "alora" else []), "midstream"],
        "license": "other",
        "license_name": "those of the data: " + ", ".join(licences),
    }
    invocation = in_table(invocation_text) + ("" if config.kind == "alora" else " (called the same way)")
    return "\n".join(
        [
            "---",
            yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=1000).strip(),
            "---",
            f"# {task.name}",
            "",
            f"{_asked(task)}",
            "",
            f"An adapter for {training.base_model}: {kind}"
            + (", which switches on at its invocation and reuses all KV before it." if config.kind == "alora" else "."),
            "",
            "| | |",
            "|---|---|",
            f"| answer | {_answer(task)} |",
            f"| judges | {_judges(task)} |",
            f"| invocation | {invocation} |",
            f"| rank, alpha | {config.rank}, {config.alpha} |",
            f"| target modules | {', '.join(config.targets)} |",
            "| weights | bfloat16 |",
            "",
            "## Data",
            "",
            *_data(training),
            "",
            "## Training",
            "",
            *_training(config, training),
            "",
            "## Figures",
            "",
            FIGURES_START,
            "Not measured yet: `midstream eval` with `--card` puts them here.",
            FIGURES_END,
            "",
        ]
    )


def in_table(text: str) -> str:
    """A text as code in a cell of a Markdown table."""
    return f"`{text!r}`".replace("|", "\\|")


def _asked(task: Task) -> str:
    return task.question.split(" Reply with")[0].split("\n")[0]


def _answer(task: Task) -> str:
    if task.kind == "label":
        return "one of " + ", ".join(f"`{task.answer(label)}`" for label in task.labels)
    if task.kind == "scale":
        return "a digit k from 0 to 9, for a chance of (k + 0.5) / 10"
    return f'`{{"{task.key}": "..."}}`' if task.key else "plain text"


def _judges(task: Task) -> str:
    turn = "the conversation" if task.reads == "any" else f"the last {task.reads} turn"
    return turn if task.instruction is None else f"{turn}, by its argument: `{task.instruction}`"


def _data(training: Training) -> list[str]:
    total = [f"| {s.title} | {count} | {s.licence} | {s.attribution} |" for s, count in training.sources]
    lines = ["| source | rows read | licence | to be named |", "|---|---|---|---|", *total, ""]
    lines += [f"- `{file.name}`, sha256 `{_sha(file)}`" for file in training.files]
    lines += ["", "The data is no part of this folder; weights trained on it are described by this list of sources."]
    if training.left_out:
        lines.append(f"{training.left_out} rows were left out because they answer another question.")
    if training.too_long:
        lines.append(f"{training.too_long} rows were left out because their conversations are longer than allowed.")
    return lines


def _training(config: TrainConfig, training: Training) -> list[str]:
    losses = ", ".join(f"{entry['validation_loss']:.4f}" for entry in training.history)
    held_out = f"{config.validation:.0%} of them held out for validation"
    return [
        f"{training.rows} rows, {held_out}. Validation loss (nats per token) after each epoch: {losses}; "
        f"epoch {training.best_epoch + 1} is exported.",
        "",
        "```sh",
        "midstream " + " ".join(map(shlex.quote, training.arguments)),
        "```",
    ]


def _sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
