"""`midstream train`: from JSON Lines of chats to a PEFT folder, and its figures on held-out rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from midstream.models.source import DEFAULT_MODEL


def train(
    data: Annotated[list[Path], typer.Option("--data", help="JSON Lines of rows; may be given several times.")],
    task: Annotated[str, typer.Option(help="answerability, jailbreak, or any name for rows with a target.")],
    out: Annotated[Path, typer.Option(help="Folder of the adapter.")],
    model: Annotated[str, typer.Option(help="Base model.")] = DEFAULT_MODEL,
    kind: Annotated[str, typer.Option(help="alora, or lora for a plain twin on the same data.")] = "alora",
    rank: int = 16,
    alpha: int = 32,
    learning_rate: float = 5e-4,
    epochs: int = 3,
    batch_size: int = 16,
    max_rows: Annotated[int | None, typer.Option(help="Balanced sample of this size.")] = None,
    max_prefix_tokens: Annotated[int | None, typer.Option(help="Leave longer conversations out.")] = None,
    wrong_documents: Annotated[
        float, typer.Option(help="Share of answerable rows repeated with others' passages.")
    ] = 0.0,
    history: Annotated[
        list[Path] | None, typer.Option(help="Rows with passages and answers, to stand before half of the rows.")
    ] = None,
    invocation: Annotated[str | None, typer.Option(help="Invocation text; proposed from the task's name.")] = None,
    seed: int = 0,
    run_folder: Annotated[Path | None, typer.Option(help="Checkpoints and losses; resumed when it exists.")] = None,
    evaluate: Annotated[
        list[Path] | None, typer.Option("--evaluate", help="Held-out rows: report, do not train.")
    ] = None,
    compare: Annotated[
        list[Path] | None, typer.Option("--compare", help="More adapter folders for the report.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Train an adapter, or with --evaluate report how well the one in --out does beside the prompted base model."""
    # torch and peft take seconds to import; the other verbs need not wait for them.
    from midstream.errors import InputError
    from midstream.training.run import DataConfig, run_evaluation, run_training
    from midstream.training.trainer import TrainConfig

    if kind not in ("alora", "lora"):
        raise InputError(f"--kind is alora or lora, not {kind}")
    rows = DataConfig(
        tuple(evaluate or data),
        task,
        max_rows,
        max_prefix_tokens,
        wrong_documents,
        tuple(history or ()),
        invocation,
        seed,
    )
    report: dict[str, Any]
    if evaluate:
        report = run_evaluation(model, rows, [out, *(compare or [])], progress=not as_json)
    else:
        config = TrainConfig(
            kind=kind,  # type: ignore[arg-type]
            rank=rank,
            alpha=alpha,
            learning_rate=learning_rate,
            epochs=epochs,
            batch_size=batch_size,
            seed=seed,
        )
        folder = run_folder or Path("runs") / f"{task}-{kind}"
        report = run_training(model, rows, config, out, folder, progress=not as_json)
    typer.echo(json.dumps(report) if as_json else json.dumps(report, indent=2))
