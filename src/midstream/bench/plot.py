"""A report as one picture. matplotlib comes with the extra `eval`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from midstream.bench.adapters import FANOUT
from midstream.bench.report import Report
from midstream.bench.work import FREE_TOKENS
from midstream.errors import InputError


def check_plot(file: Path) -> None:
    """Raises InputError where a picture could not be drawn, before anything is measured for it."""
    if find_spec("matplotlib") is None:
        raise InputError("a picture needs matplotlib: pip install 'midstream[eval]'")
    if file.suffix.lower() != ".png":
        raise InputError(f"{file}: the picture's name must end with .png")


def draw(file: Path, report: Report) -> None:
    """One PNG over the contexts: times of the first call, its ratio beside the bound, and the decode step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    times, ratios, steps = figure.subplots(1, 3)
    for name, label in (
        ("label_lora_ms", "LoRA"),
        ("label_alora_ms", "aLoRA"),
        ("fanout_ms", f"{FANOUT} aLoRAs at once"),
    ):
        _curve(times, report, name, label)
    times.set(title="first call, label answer", ylabel="ms", yscale="log")
    for kind, label, color in (("label", "label answer", "C0"), ("free", f"{FREE_TOKENS} free tokens", "C1")):
        _curve(ratios, report, f"{kind}_ratio", label, color=color)
        _curve(ratios, report, f"{kind}_bound", f"{label}: bound", color=color, linestyle="--", marker=None)
    ratios.set(title="LoRA time / aLoRA time", yscale="log")
    _curve(steps, report, "step_over_reading", "one stream")
    steps.set(title="decode step / reading weights + KV once", ylim=(0, None))
    for axes in (times, ratios, steps):
        axes.set_xlabel("tokens of the conversation")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    figure.suptitle(f"{report.model['name']}, {report.model['dtype']}: medians of {report.rounds} rounds, quartiles")
    figure.savefig(file, dpi=120)


def _curve(axes: Any, report: Report, name: str, label: str, **style: Any) -> None:
    """Medians with their quartiles; nothing where none is measured."""
    points = [(row.context, found[name]) for row in report.measured if name in (found := row.figures())]
    if not points:
        return
    middle = [each["median"] for _, each in points]
    # Rounding may put a quartile past a median that equals it.
    below = [max(0.0, each["median"] - each["q1"]) for _, each in points]
    above = [max(0.0, each["q3"] - each["median"]) for _, each in points]
    style.setdefault("marker", "o")
    axes.errorbar([context for context, _ in points], middle, yerr=[below, above], label=label, capsize=3, **style)
