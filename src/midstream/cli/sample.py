"""`midstream sample`: the base model's own answers to questions, as training rows for `certainty`."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from midstream.cli.common import Dtype, Model, open_engine, show_progress
from midstream.errors import InputError
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
    from midstream.jsonl import read_lines

    questions = []
    for file in data:
        read = read_lines([file], read_question)
        random.Random(seed).shuffle(read)
        questions += read[:max_rows]
    settings = {"model": model, "seed": seed, "answers_drawn": answers}
    done = _done(out, settings)
    left = [question for question in questions if (question.source, question.id) not in done]
    bar = Progress(console=Console(stderr=True), disable=not show_progress(False))
    with open_engine(model, None, dtype, progress=True, library=False) as engine, out.open("a") as rows, bar:
        for start in bar.track(range(0, len(left), _CHUNK), description="questions"):
            chunk = left[start : start + _CHUNK]
            for row in engine.portal.run(certainty_rows(engine.aio, chunk, count=answers, seed=seed)):
                rows.write(json.dumps({**row, **settings}, ensure_ascii=False) + "\n")
            rows.flush()
    typer.echo(f"{out}: {len(questions)} questions, {answers} answers each, {len(left)} of them asked now")


def _done(path: Path, settings: dict[str, Any]) -> set[tuple[str, str]]:
    """Source and id of the questions answered already; a last line that a kill has torn is taken away."""
    if not path.is_file():
        return set()
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    rows = [json.loads(line) for line in whole.split("\n") if line.strip()]
    for row in rows:
        if any(row.get(key) != value for key, value in settings.items()):
            raise InputError(f"{path} holds answers drawn with other settings than {settings}: choose another --out")
    return {(str(row["source"]), str(row["id"])) for row in rows}
