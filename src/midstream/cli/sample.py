"""`midstream sample`: the base model's own answers to questions, as training rows for `certainty`."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from midstream.cli.common import Dtype, Model, open_engine, show_progress
from midstream.models.source import DEFAULT_MODEL

_CHUNK = 16


def sample(
    data: Annotated[list[Path], typer.Option("--data", help="JSON Lines of questions; may be given several times.")],
    out: Annotated[Path, typer.Option(help="JSON Lines of rows; continued when it exists.")],
    model: Model = DEFAULT_MODEL,
    answers: Annotated[int, typer.Option(help="Answers drawn per question.", min=1)] = 10,
    max_rows: Annotated[int | None, typer.Option(help="So many questions of each file, drawn by the seed.")] = None,
    seed: int = 0,
    dtype: Dtype = None,
) -> None:
    """Ask the base model every question several times and keep the share of right answers."""
    from midstream.evaluation.answers import certainty_rows, read_question
    from midstream.training.jsonl import read_lines

    questions = []
    for file in data:
        read = read_lines([file], read_question)
        random.Random(seed).shuffle(read)
        questions += read[:max_rows]
    done = {json.loads(line)["id"] for line in _lines(out)}
    left = [question for question in questions if question.id not in done]
    bar = Progress(console=Console(stderr=True), disable=not show_progress(False))
    with open_engine(model, None, dtype, progress=True, library=False) as engine, out.open("a") as rows, bar:
        for start in bar.track(range(0, len(left), _CHUNK), description="questions"):
            chunk = left[start : start + _CHUNK]
            for row in engine.portal.run(certainty_rows(engine.aio, chunk, count=answers, seed=seed)):
                rows.write(json.dumps(row, ensure_ascii=False) + "\n")
            rows.flush()
    typer.echo(f"{out}: {len(questions)} questions, {answers} answers each")


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        return []
    return [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
