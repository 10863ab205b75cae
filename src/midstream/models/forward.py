"""One forward of the model over a packed batch: what it is asked for, and how it is run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from midstream.models.attention_plan import AttentionPlan, RowSegment
from midstream.models.deltas import DeltaGroup
from midstream.models.device import on_device
from midstream.models.load import LoadedModel
from midstream.models.pool import ForwardPlan, KVPool

# Logits of so many rows are brought to the host in one copy, where sampling each of them waits for no device.
_HOST_ROWS = 64


@dataclass(frozen=True, slots=True)
class Batch:
    """Tokens with their positions, row by row; the segments that they form; the rows that adapters own.

    `wanted`: the rows whose logits are needed.
    """

    tokens: list[int]
    positions: list[int]
    segments: tuple[RowSegment, ...]
    groups: tuple[DeltaGroup, ...]
    wanted: list[int]


class Forward(Protocol):
    """Owns the KV pool of one model."""

    def run(self, batch: Batch) -> Tensor:
        """Write the batch's KV to its slots; logits [wanted, vocab] in float32."""
        ...


class EagerForward:
    """Calls the model."""

    def __init__(self, loaded: LoadedModel, pool: KVPool) -> None:
        self._loaded = loaded
        self._pool = pool

    def run(self, batch: Batch) -> Tensor:
        loaded, device = self._loaded, self._loaded.device
        attention = AttentionPlan(batch.segments, loaded.dtype, device, len(batch.tokens), loaded.extents)
        loaded.deltas.set(batch.groups)
        try:
            with on_device(device):
                logits = loaded.call(
                    torch.tensor(batch.tokens, device=device),
                    torch.tensor(batch.positions, device=device),
                    # A step of nothing but prefill needs no logits; one row keeps every head's shape legal.
                    torch.tensor(batch.wanted or [0], device=device),
                    ForwardPlan(attention, self._pool, loaded.kernels),
                )
        finally:
            loaded.deltas.set(())
        return on_host(logits)


def on_host(logits: Tensor) -> Tensor:
    """Logits [rows, vocab] in float32, in the host's memory where they are few."""
    return logits.float().cpu() if len(logits) <= _HOST_ROWS else logits.float()
