"""The memory of all keys and values, and what one forward gets to use it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from midstream.models.attention_plan import AttentionPlan
from midstream.models.kernels import Kernels
from midstream.models.kv import KVKind, LayerKV, bytes_per_slot


class KVPool:
    """Keys and values of all layers, an extent of which is a strided view.

    `shapes`: KV heads and the size of each, by layer; `kind` "int8": in eight bits; None: as the model computes them.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        num_slots: int,
        dtype: torch.dtype,
        device: torch.device,
        kind: KVKind | None = None,
        *,
        spare: int = 0,
    ) -> None:
        """`spare` slots lie behind the `num_slots` that are handed out."""
        self.num_slots = num_slots
        room = num_slots + spare
        self.layers = [LayerKV.empty(heads, room, dim, dtype, device, kind) for heads, dim in shapes]

    def write(self, layer: int, slots: Tensor, key: Tensor, value: Tensor) -> LayerKV:
        """Put key and value [kv_heads, rows, head_dim] into `slots`; return all that the layer has."""
        self.layers[layer].write(slots, key, value)
        return self.layers[layer]

    @staticmethod
    def bytes_per_slot(shapes: Sequence[tuple[int, int]], dtype: torch.dtype, kind: KVKind | None = None) -> int:
        """Bytes of one token's keys and values over all layers."""
        return sum(bytes_per_slot(shape, dtype, kind) for shape in shapes)


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

    def write(self, layer: int, slots: Tensor, key: Tensor, value: Tensor) -> LayerKV:
        if key.shape != value.shape:
            shapes = f"keys {tuple(key.shape)} and values {tuple(value.shape)}"
            raise RuntimeError(f"{shapes} of one layer differ in shape")
        return LayerKV(key, value)

    def note(self, layer: int, shape: AttentionShape) -> None:
        self.shapes[layer] = shape


@dataclass(frozen=True, slots=True)
class ForwardPlan:
    """What one forward needs beside its tokens; passed through the model as a keyword argument."""

    attention: AttentionPlan
    pool: KVPool
    kernels: Kernels
