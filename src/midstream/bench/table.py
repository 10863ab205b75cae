"""A report for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from midstream.bench.report import FIGURES, FigureOf, Report, Row


def head(report: Report) -> list[str]:
    """What was measured, where and with which adapters, in rich's markup."""
    model, machine = report.model, report.machine
    where = machine.get("gpu") or f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads"
    speed = machine[f"gflop_per_s_{model['dtype']}"]
    lines = [
        f"{model['name']}, {model['dtype']}, {where}; {report.rounds} rounds",
        f"the machine itself: reads {machine['read_gb_per_s']} GB/s, products {speed:.0f} GFLOP/s",
        _adapters(report.adapters),
    ]
    return [escape(line) for line in lines]


def warnings(report: Report) -> list[str]:
    """What is missing from the figures, and why to doubt them, in rich's markup."""
    lines = [f"{each['what']} at {each['context']} tokens left out: {each['reason']}" for each in report.left_out]
    lines += report.warnings
    if report.ended is not None:
        lines.append(f"ended early ({report.ended}); the figures are of the rounds that were whole")
    return [f"[yellow]{escape(line)}[/]" for line in lines]


def table(report: Report) -> Table:
    """A column a context; each figure's median over the rounds with its quartiles."""
    rows = report.measured
    shown = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    shown.add_column("median (quartiles)", no_wrap=True)
    for row in rows:
        shown.add_column(f"{row.context} tokens", justify="right", overflow="fold")
    figures = [row.figures() for row in rows]
    for figure in FIGURES:
        shown.add_row(figure.label, *(figure.shown(found.get(figure.name)) for found in figures))
        if figure.name.endswith("_bound"):
            shown.add_row("  share of the bound", *(_share(figure, row) for row in rows))
    return shown


def _share(figure: FigureOf, row: Row) -> str:
    share = row.shares().get(figure.name.removesuffix("_bound"))
    return "–" if share is None else f"{share:.0%}"


def _adapters(adapters: Mapping[str, Any]) -> str:
    count, random = len(adapters["alora"]), adapters["random"]
    kind = f"{count} of the library" if not random else f"{count - random} of the library, {random} random"
    if random == count:
        kind = f"{count} with random weights (their speed is a trained one's, their answers mean nothing)"
    return f"adapters: {kind}; rank {adapters['rank']}, invocation of {adapters['invocation_tokens']} tokens"
