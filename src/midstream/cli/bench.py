"""`midstream bench`: the engine's speed, and what a call costs, on this machine and with this model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from midstream.bench.contexts import SHORTEST
from midstream.cli.common import KV, Dtype, Model, Weights, show_progress
from midstream.config import EngineConfig
from midstream.errors import InputError
from midstream.models.source import DEFAULT_MODEL

if TYPE_CHECKING:
    from midstream.bench.report import Report
    from midstream.bench.run import Run
    from midstream.session import Engine


def bench(
    model: Model = DEFAULT_MODEL,
    contexts: Annotated[str, typer.Option(help="Tokens of the conversations, with commas.")] = "512,2048,4096",
    rounds: Annotated[int, typer.Option(help="How often all is measured.", min=1)] = 5,
    rank: Annotated[
        int | None,
        typer.Option(help="Random adapters of this rank; default: the library's, or random ones of 16.", min=1),
    ] = None,
    dtype: Dtype = None,
    weights: Weights = None,
    kv: KV = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one.")] = None,
    kv_mib: Annotated[
        int | None, typer.Option(help="Memory of the KV cache in MiB; default: one context, at least 512.", min=1)
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Draw the figures over the contexts.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all measurements for programs.")] = None,
) -> None:
    """Measure prefill, decoding, first calls of a LoRA and an aLoRA, and a fan-out, beside the machine's own limits.

    Each figure is the median of all rounds with its quartiles. Control-C ends it with what was measured so far.
    """
    lengths = _lengths(contexts)
    _check_outputs(png, json_file)
    # torch and transformers take seconds to import; a wrong option is answered at once.
    from midstream.bench.machine import load_average
    from midstream.bench.run import Run

    config = EngineConfig(kv_budget_bytes=None if kv_mib is None else kv_mib * 1024**2, kv_dtype=kv)
    load_before = load_average()
    with _engine(model, config, dtype=dtype, weights=weights, device=device) as engine:
        run = Run(engine, lengths, rounds, rank=rank, load_before=load_before)
        try:
            _measure(run)
        except BaseException as error:
            run.finish("interrupted" if isinstance(error, KeyboardInterrupt) else f"failed: {error}")
            _tell(run.report, png, json_file)
            raise
    run.finish()
    _tell(run.report, png, json_file)


def _lengths(given: str) -> list[int]:
    try:
        found = sorted({int(each) for each in given.split(",")})
    except ValueError as error:
        raise InputError(f"--contexts {given}: give whole numbers with commas, as in 512,2048") from error
    if found[0] < SHORTEST:
        raise InputError(f"--contexts {given}: a context has at least {SHORTEST} tokens")
    return found


def _check_outputs(png: Path | None, json_file: Path | None) -> None:
    """Refuse outputs that cannot be written before anything is measured for them."""
    if png is not None:
        from midstream.bench.plot import check_plot

        check_plot(png)
    for file, option in ((png, "--png"), (json_file, "--json")):
        if file is not None:
            _check_writable(file, option)


def _check_writable(file: Path, option: str) -> None:
    """Only an attempt tells: permissions and read-only file systems look writable to some users."""
    existed = file.exists()
    try:
        with file.open("ab"):
            pass
    except OSError as error:
        raise InputError(f"{option}: {file} cannot be written: {error.strerror}") from error
    if not existed:
        file.unlink()


@contextmanager
def _engine(model: str, config: EngineConfig, **loading: str | None) -> Iterator[Engine]:
    from midstream.session import Engine

    with Engine.load(model, config=config, **loading, wait_for_kernels=True, progress=show_progress(False)) as engine:
        yield engine


def _measure(run: Run) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    bar = Progress(
        *columns,
        console=Console(stderr=True),
        disable=not show_progress(False),
        # Drawing takes time of a core that is measured.
        refresh_per_second=2,
        # Pieces take seconds to minutes: the time left is told from all of them, not from the last half minute's.
        speed_estimate_period=24 * 3600,
    )
    with bar:
        job = bar.add_task("", total=sum(piece.cost for piece in run.pieces))
        for piece in run.pieces:
            bar.update(job, description=piece.text)
            piece.run()
            bar.advance(job, piece.cost)


def _tell(report: Report, png: Path | None, json_file: Path | None) -> None:
    """Files first: nothing that happens to the terminal may lose them."""
    from midstream.bench.table import head, table, warnings

    if json_file is not None:
        json_file.write_text(json.dumps(report.as_dict(), indent=2) + "\n", encoding="utf-8")
    if png is not None and report.measured:
        from midstream.bench.plot import draw

        draw(png, report)
    console = Console(highlight=False)
    for line in head(report):
        console.print(line, soft_wrap=True)
    if report.measured:
        console.print(table(report))
    for line in warnings(report):
        console.print(line, soft_wrap=True)
