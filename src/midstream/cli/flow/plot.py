"""The picture of a best-of-n run: the best score against the tokens that it took."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from midstream.errors import InputError
from midstream.flows.best_of_n import BestOfN


def check_plot(file: Path) -> None:
    """Raises InputError where a picture could not be drawn, before anything is run for it."""
    if find_spec("matplotlib") is None:
        raise InputError("--plot needs matplotlib: pip install 'midstream[eval]'")
    if file.suffix.lower() != ".png":
        raise InputError(f"--plot: {file} does not end with .png")


def draw_curve(file: Path, result: BestOfN) -> None:
    """One PNG: the best score after each answer, over the tokens computed by then, and each answer's own score."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    points = result.curve()
    best = [(point.tokens, point.score) for point in points if point.score is not None]
    own = [(p.tokens, c.score) for p, c in zip(points, result.candidates, strict=True) if c.score is not None]
    axes.step([at for at, _ in best], [score for _, score in best], where="post", marker="o", label="best so far")
    axes.scatter([at for at, _ in own], [score for _, score in own], color="grey", s=12, label="each answer")
    axes.set_xlabel("tokens computed, prompt and answers")
    axes.set_ylabel("score")
    axes.set_title(f"best of {len(result.candidates)}, seed {result.seed}")
    axes.legend()
    figure.savefig(file, dpi=120)
