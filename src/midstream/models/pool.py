"""The memory of all keys and values, and what one forward gets to use it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from midstream.models.attention_plan import AttentionPlan
from midstream.models.kernels import Kernels


class KVPool:
    """Keys and values of all layers: per layer [kv_heads, slots, head_dim], so that an extent is a strided view."""

    def __init__(
        self,
        shapes: list[tuple[int, int]],
        num_slots: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        spare: int = 0,
    ) -> None:
        """`spare` slots lie behind the `num_slots` that are handed out."""
        self.num_slots = num_slots
        room = num_slots + spare
        # Not zeroed: pages that no request has used yet take no memory.
        self.keys = [torch.empty(h, room, d, dtype=dtype, device=device) for h, d in shapes]
        self.values = [torch.empty(h, room, d, dtype=dtype, device=device) for h, d in shapes]

    def write(self, layer: int, slots: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put key and value [kv_heads, rows, head_dim] into `slots`; return the layer's whole keys and values."""
        keys, values = self.keys[layer], self.values[layer]
        keys.index_copy_(1, slots, key)
        values.index_copy_(1, slots, value)
        return keys, values

    @staticmethod
    def bytes_per_slot(shapes: list[tuple[int, int]], dtype: torch.dtype) -> int:
        """Bytes of one token's keys and values over all layers."""
        return sum(2 * heads * dim for heads, dim in shapes) * dtype.itemsize


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """How a layer attends, as the model itself shows it: its heads, the factor of its scores, its window."""

    heads: int
    kv_heads: int
    dim: int
    scale: float
    window: int | None


class ProbePool(KVPool):
    """A pool for one sequence from slot 0 on, whose shapes the model itself shows at its first forward."""

    def __init__(self) -> None:
        super().__init__([], 0, torch.float32, torch.device("cpu"))
        self.shapes: dict[int, AttentionShape] = {}

    def write(self, layer: int, slots: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if key.shape != value.shape:
            shapes = f"keys {tuple(key.shape)} and values {tuple(value.shape)}"
            raise RuntimeError(f"{shapes} of one layer differ in shape")
        return key, value

    def note(self, layer: int, shape: AttentionShape) -> None:
        self.shapes[layer] = shape


@dataclass(frozen=True, slots=True)
class ForwardPlan:
    """What one forward needs beside its tokens; passed through the model as a keyword argument."""

    attention: AttentionPlan
    pool: KVPool
    kernels: Kernels
