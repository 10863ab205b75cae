"""`midstream train`: from JSON Lines of chats to a PEFT folder."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from midstream.cli.common import Json, Model, show_progress
from midstream.models.source import DEFAULT_MODEL


class Kind(StrEnum):
    """An activated LoRA, or a plain one on the same data."""

    alora = "alora"
    lora = "lora"


class Targets(StrEnum):
    """Which linear layers are adapted."""

    attention = "attention"
    all_linear = "all-linear"


def train(
    data: Annotated[list[Path], typer.Option("--data", help="JSON Lines of rows; may be given several times.")],
    task: Annotated[str, typer.Option(help="A known task (docs/train.md), or any name for rows with a target.")],
    out: Annotated[Path, typer.Option(help="Folder of the adapter.")],
    model: Model = DEFAULT_MODEL,
    kind: Annotated[Kind, typer.Option(help="alora, or lora for a plain twin on the same data.")] = Kind.alora,
    rank: Annotated[int, typer.Option(min=1)] = 16,
    alpha: Annotated[int | None, typer.Option(min=1, help="Default: twice the rank.")] = None,
    targets: Annotated[Targets, typer.Option(help="Linear layers to adapt.")] = Targets.all_linear,
    learning_rate: Annotated[float, typer.Option(min=0.0)] = 5e-4,
    epochs: Annotated[int, typer.Option(min=1)] = 3,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    dropout: Annotated[float, typer.Option(min=0.0, max=0.9)] = 0.0,
    gradient_checkpointing: Annotated[bool, typer.Option(help="Less memory, more time.")] = False,
    dtype: Annotated[str | None, typer.Option(help="float32 (default on a CPU) or bfloat16 (on CUDA).")] = None,
    max_rows: Annotated[int | None, typer.Option(min=2, help="Sample of this size, balanced by label.")] = None,
    max_prefix_tokens: Annotated[int | None, typer.Option(min=1, help="Leave longer conversations out.")] = None,
    wrong_documents: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of positive rows repeated with others' passages.")
    ] = 0.0,
    history: Annotated[
        list[Path] | None, typer.Option(help="Rows with passages and answers, to stand before half of the rows.")
    ] = None,
    invocation: Annotated[str | None, typer.Option(help="Invocation text; default: one is proposed.")] = None,
    instruction: Annotated[
        str | None, typer.Option(help="Text of a last user turn; {name} stands for an argument of the rows.")
    ] = None,
    positive: Annotated[
        str | None, typer.Option(help="Of labels of your own, the one that F1, AUROC and the curves are about.")
    ] = None,
    seed: int = 0,
    run_folder: Annotated[Path | None, typer.Option(help="Checkpoints and losses; gone on with if there.")] = None,
    kv_memory: Annotated[float, typer.Option(help="GiB of memory for the KV of prefixes.", min=0.0)] = 4.0,
    kv_disk: Annotated[float, typer.Option(help="GiB of disk (cache folder) for it, for later runs.", min=0.0)] = 4.0,
    as_json: Json = False,
) -> None:
    """Train an adapter; `midstream eval` measures it."""
    # torch and peft take seconds to import; the other verbs need not wait for them.
    from midstream.training.run import Budget, DataConfig, run_training
    from midstream.training.trainer import ALL_LINEAR, ATTENTION, TrainConfig

    rows = DataConfig(
        tuple(data),
        task,
        max_rows,
        max_prefix_tokens,
        wrong_documents,
        tuple(history or ()),
        invocation,
        instruction,
        positive,
        seed,
    )
    config = TrainConfig(
        kind=kind.value,
        rank=rank,
        alpha=alpha or 2 * rank,
        targets=ATTENTION if targets is Targets.attention else ALL_LINEAR,
        dropout=dropout,
        learning_rate=learning_rate,
        epochs=epochs,
        batch_size=batch_size,
        gradient_checkpointing=gradient_checkpointing,
        seed=seed,
    )
    report = run_training(
        model,
        rows,
        config,
        out,
        run_folder or Path("runs") / f"{out.name}-{kind.value}",
        dtype=dtype,
        budget=Budget(int(kv_memory * 2**30), int(kv_disk * 2**30)),
        arguments=sys.argv[1:],
        progress=show_progress(as_json),
    )
    typer.echo(json.dumps(report, indent=None if as_json else 2, ensure_ascii=False))
