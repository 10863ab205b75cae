"""What a training run keeps on disk: a checkpoint to go on from, and its losses as a table and a picture."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from midstream.errors import InputError

LossRow = dict[str, float | None]
_COLUMNS = ("step", "epoch", "learning_rate", "train_loss", "validation_loss")


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Written beside and renamed, so that a kill at any moment leaves the last whole one."""
    part = folder / "checkpoint.part"
    torch.save(state, part)
    os.replace(part, folder / "checkpoint.pt")


def load_checkpoint(folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The state to go on from, None if there is none. Raises InputError when it is another run's."""
    path = folder / "checkpoint.pt"
    if not path.is_file():
        return None
    state: dict[str, Any] = torch.load(path, weights_only=True)
    if state["settings"] != settings:
        raise InputError(f"{path} was made with other settings or rows: use another run folder, or remove it")
    return state


def write_losses(folder: Path, rows: Sequence[LossRow]) -> None:
    """loss.csv: one row a step, the validation loss where an epoch ends."""
    with (folder / "loss.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, _COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def draw_losses(folder: Path, rows: Sequence[LossRow]) -> None:
    """loss.png: the losses as curves."""
    # The figure's own canvas: no backend is chosen for the program that imports us.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for column, style in (("train_loss", {"linewidth": 0.8}), ("validation_loss", {"marker": "o"})):
        points = [(row["step"], row[column]) for row in rows if row[column] is not None]
        axes.plot(*np.array(points, dtype=float).T, label=column.replace("_", " "), **style)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.legend()
    figure.savefig(folder / "loss.png", dpi=120)
