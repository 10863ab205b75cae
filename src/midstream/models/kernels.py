"""What a layer computes between its matrix products, as torch's own operations; `native` has faster ones for CPUs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from midstream.models.deltas import DeltaContext, Part
from midstream.models.extents import ExtentCall
from midstream.models.products import Product, WeightKind, torch_product

if TYPE_CHECKING:
    from midstream.models.pool import ForwardPlan


class StackRun(Protocol):
    """All layers of a model in one call."""

    def __call__(self, x: Tensor, positions: tuple[Tensor, Tensor], plan: ForwardPlan, context: DeltaContext) -> bool:
        """Change x [rows, features] as the layers do, one after the other; False, and nothing done, where it cannot.

        positions: cosine and sine [rows, dim] of the rotary embedding.
        """
        ...


class Kernels(Protocol):
    """`few_queries`: how many query vectors a KV head may have in an ExtentCall; 0 where there is no `attend`."""

    few_queries: int

    def supports(self, dim: int) -> bool:
        """Whether heads of this size can be attended."""
        ...

    def product(self, weight: Tensor, bias: Tensor | None, kind: WeightKind | None) -> Product:
        """The product with a weight [out, in], kept in the layout (and, with `kind`, the numbers) that suits best."""
        ...

    def stack(self, layers: Sequence[Any]) -> StackRun | None:
        """All these fused layers as one call, where there is one."""
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

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, call: ExtentCall, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Attention of the call's rows, of query [heads, rows, dim]: out [call's rows, heads, dim], lse [heads, …]."""
        ...

    def add_deltas(self, x: Tensor, y: Tensor, context: DeltaContext, parts: Sequence[Part]) -> bool:
        """Add the adapters' deltas of x [rows, in] to y [rows, out]; False, and nothing done, where it does not pay."""
        ...


def add_scaled(x: Tensor, update: Tensor, scale: float) -> None:
    """Add scale · update to x in place. Not by torch's `alpha`, which is itself rounded to the tensors' type."""
    x.add_(update if scale == 1.0 else update * scale)


class TorchKernels:
    """For every device and type."""

    few_queries = 0

    def supports(self, dim: int) -> bool:
        return False

    def product(self, weight: Tensor, bias: Tensor | None, kind: WeightKind | None) -> Product:
        return torch_product(weight, bias, kind)

    def stack(self, layers: Sequence[Any]) -> StackRun | None:
        return None

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, eps)

    def add_norm(self, x: Tensor, update: Tensor, alpha: float, weight: Tensor, eps: float) -> Tensor:
        add_scaled(x, update, alpha)
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

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, call: ExtentCall, scale: float
    ) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("plans for these kernels have no ExtentCall")

    def add_deltas(self, x: Tensor, y: Tensor, context: DeltaContext, parts: Sequence[Part]) -> bool:
        return False
