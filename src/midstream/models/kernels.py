"""What a layer computes between its matrix products, as torch's own operations; `native` has faster ones for CPUs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from midstream.models.attention_plan import AttentionPlan
from midstream.models.deltas import DeltaContext, Part
from midstream.models.extents import ExtentCall


class Kernels(Protocol):
    """`few_queries`: how many query vectors a KV head may have in an ExtentCall; 0 where there is no `attend`."""

    few_queries: int

    def supports(self, dim: int) -> bool:
        """Whether heads of this size can be attended."""
        ...

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Root-mean-square norm of x [rows, features]."""
        ...

    def add_norm(self, x: Tensor, update: Tensor, alpha: float, weight: Tensor, eps: float) -> Tensor:
        """Add alpha · update to x in place; the norm of the sum."""
        ...

    def rotate(self, qkv: Tensor, cosine: Tensor, sine: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> Tensor:
        """Split qkv [rows, (heads + 2 kv_heads) · dim], rotate by position, put keys and values into their slots.

        cosine and sine are [rows, dim] with equal halves; keys and values [kv_heads, all slots, dim]. Returns the
        queries [heads, rows, dim].
        """
        ...

    def gated(self, both: Tensor) -> Tensor:
        """silu(gate) · up, of [rows, 2 · width] that holds both side by side."""
        ...

    def attend_step(
        self, query: Tensor, keys: Tensor, values: Tensor, plan: AttentionPlan, scale: float, window: int | None
    ) -> Tensor | None:
        """Attention of all rows of a step at once: query [heads, rows, dim] → [rows, heads, dim].

        None, and nothing done, where the plan's calls have to do it.
        """
        ...

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, call: ExtentCall, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Attention of the call's rows, of query [heads, rows, dim]: out [call's rows, heads, dim], lse [heads, …]."""
        ...

    def add_deltas(self, x: Tensor, y: Tensor, context: DeltaContext, parts: Sequence[Part]) -> bool:
        """Add the adapters' deltas of x [rows, in] to y [rows, out]; False, and nothing done, where it does not pay."""
        ...


class TorchKernels:
    """For every device and type."""

    few_queries = 0

    def supports(self, dim: int) -> bool:
        return False

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, eps)

    def add_norm(self, x: Tensor, update: Tensor, alpha: float, weight: Tensor, eps: float) -> Tensor:
        x.add_(update, alpha=alpha)
        return self.norm(x, weight, eps)

    def rotate(self, qkv: Tensor, cosine: Tensor, sine: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> Tensor:
        kv_heads, _, dim = keys.shape
        split = qkv.view(qkv.shape[0], -1, dim).transpose(0, 1)
        turning, value = split[:-kv_heads], split[-kv_heads:]
        first, second = turning.chunk(2, dim=-1)
        turned = turning * cosine + torch.cat((-second, first), dim=-1) * sine
        keys.index_copy_(1, slots, turned[-kv_heads:])
        values.index_copy_(1, slots, value)
        return turned[:-kv_heads]

    def gated(self, both: Tensor) -> Tensor:
        gate, up = both.chunk(2, dim=-1)
        return F.silu(gate) * up

    def attend_step(
        self, query: Tensor, keys: Tensor, values: Tensor, plan: AttentionPlan, scale: float, window: int | None
    ) -> Tensor | None:
        return None

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, call: ExtentCall, scale: float
    ) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("plans for these kernels have no ExtentCall")

    def add_deltas(self, x: Tensor, y: Tensor, context: DeltaContext, parts: Sequence[Part]) -> bool:
        return False
