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
    each: Annotated[
        int,
        typer.Option(
            help="A row for each of so many answers, told right or wrong; 0: one row, with the share of right ones.",
            min=0,
        ),
    ] = 0,
    seed: int = 0,
    dtype: Dtype = None,
) -> None:
    """Ask the base model every question several times and keep which answers were right."""
    from midstream.evaluation.answers import certainty_rows, read_question
    from midstream.jsonl import read_lines

    questions = []
    for file in data:
        read = read_lines([file], read_question)
        random.Random(seed).shuffle(read)
        questions += read[:max_rows]
    if each > answers:
        raise InputError(f"--each {each} needs as many answers: {answers} are drawn")
    settings = {"model": model, "seed": seed, "answers_drawn": answers, "each": each}
    done = _done(out, settings)
    left = [question for question in questions if (question.source, question.id) not in done]
    bar = Progress(console=Console(stderr=True), disable=not show_progress(False))
    engine = open_engine(model, None, dtype, progress=True, library=False, wait_for_kernels=True)
    with engine, out.open("a") as rows, bar:
        for start in bar.track(range(0, len(left), _CHUNK), description="questions"):
            chunk = left[start : start + _CHUNK]
            for row in engine.portal.run(certainty_rows(engine.aio, chunk, count=answers, seed=seed, each=each)):
                rows.write(json.dumps({**row, **settings}, ensure_ascii=False) + "\n")
            rows.flush()
    typer.echo(f"{out}: {len(questions)} questions, {answers} answers each, {len(left)} of them asked now")


def _done(path: Path, settings: dict[str, Any]) -> set[tuple[str, str]]:
    """Source and id of the questions answered already; a last line that a kill has torn is taken away, and so are the
    rows of a last question that has not all of its own."""
    if not path.is_file():
        return set()
    text = path.read_text(encoding="utf-8")
    lines = text[: text.rfind("\n") + 1].splitlines(keepends=True)
    rows = [json.loads(line) for line in lines]
    for row in rows:
        if any(row.get(key, 0) != value for key, value in settings.items()):
            raise InputError(f"{path} holds answers drawn with other settings than {settings}: choose another --out")
    asked = [_asked(row, settings["each"]) for row in rows]
    if settings["each"] and asked and asked.count(asked[-1]) < settings["each"]:
        first = asked.index(asked[-1])
        lines, asked = lines[:first], asked[:first]
    if "".join(lines) != text:
        path.write_text("".join(lines), encoding="utf-8")
    return set(asked)


def _asked(row: dict[str, Any], each: int) -> tuple[str, str]:
    """The question of a row. With several rows a question, their number stands behind its id."""
    name = str(row["id"])
    return str(row["source"]), name.rpartition("#")[0] if each else name
