"""The cosines and sines of rotary positions, looked up where a model's are the same in every step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Turning = tuple[Tensor, Tensor]
Rotary = Callable[[Tensor, Tensor], Turning]

# Kinds whose frequencies depend on the model alone, not on how long the longest sequence of a step is.
_FIXED = frozenset({"default", "linear", "llama3", "yarn"})
_FEWEST = 1024


class RotaryTable:
    """What a rotary module gives, computed by it once for each position."""

    def __init__(self, rotary: Rotary) -> None:
        self._rotary = rotary
        self._tables: Turning | None = None

    def __call__(self, x: Tensor, positions: Tensor) -> Turning:
        """positions [1, rows] → cosine and sine [1, rows, dim], in the type of x."""
        last = int(positions.max())
        if self._tables is None or self._tables[0].shape[0] <= last or self._tables[0].dtype != x.dtype:
            self._tables = self._compute(x, last)
        cosine, sine = (table.index_select(0, positions[0]) for table in self._tables)
        return cosine[None], sine[None]

    def _compute(self, x: Tensor, last: int) -> Turning:
        length = max(_FEWEST, 1 << last.bit_length())
        cosine, sine = self._rotary(x, torch.arange(length, device=x.device)[None])
        return cosine[0], sine[0]


def tabled(rotary: nn.Module, device: torch.device) -> Rotary:
    """On the CPU, a table in the module's place if its kind allows one. On a GPU its few launches are recorded once,
    and finding the last position would wait for the device."""
    fixed = getattr(rotary, "rope_type", None) in _FIXED
    return RotaryTable(rotary) if fixed and device.type == "cpu" else rotary
