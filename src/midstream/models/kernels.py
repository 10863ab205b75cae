"""What a layer computes between its matrix products, as torch's own operations; `native` has faster ones for CPUs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from midstream.models.attention_plan import AttentionPlan
from midstream.models.deltas import DeltaContext, Part
from midstream.models.extents import ExtentCall
from midstream.models.kv import LayerKV
from midstream.models.products import Product, WeightKind, WideProduct, torch_product

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
    def supports(self, dim: int) -> bool:
        """Whether there is an `attend` for heads of this size."""
        ...

    def product(self, weight: Tensor, bias: Tensor | None, kind: WeightKind | None, *, wide: bool = False) -> Product:
        """The product with a weight [out, in], kept in the layout (and, with `kind`, the numbers) that suits best.

        `wide`: its result is of float32, whatever the type of what goes in.
        """
        ...

    def repacked(self, product: Product) -> Product:
        """The same product in the layout that suits these kernels best; itself, where that is what it has."""
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

    def rotate(self, qkv: Tensor, cosine: Tensor, sine: Tensor, kv: LayerKV, slots: Tensor) -> Tensor:
        """Split qkv [rows, (heads + 2 kv_heads) · dim], rotate by position, put keys and values into their slots.

        cosine and sine are [rows, dim] with equal halves. Returns the queries [heads, rows, dim].
        """
        ...

    def gated(self, both: Tensor) -> Tensor:
        """silu(gate) · up, of [rows, 2 · width] that holds both side by side."""
        ...

    def attend_step(
        self, query: Tensor, kv: LayerKV, plan: AttentionPlan, scale: float, window: int | None
    ) -> Tensor | None:
        """Attention of all rows of a step at once: query [heads, rows, dim] → [rows, heads, dim].

        None, and nothing done, where the plan's calls have to do it.
        """
        ...

    def attend(self, query: Tensor, kv: LayerKV, call: ExtentCall, scale: float) -> Tensor:
        """Attention of query [heads, rows, dim]: [rows, heads, dim]."""
        ...

    def add_deltas(self, x: Tensor, y: Tensor, context: DeltaContext, parts: Sequence[Part]) -> bool:
        """Add the adapters' deltas of x [rows, in] to y [rows, out]; False, and nothing done, where it does not pay."""
        ...


def add_scaled(x: Tensor, update: Tensor, scale: float) -> None:
    """Add scale · update to x in place. Not by torch's `alpha`, which is itself rounded to the tensors' type."""
    x.add_(update if scale == 1.0 else update * scale)


class TorchKernels:
    """For every device and type."""

    def supports(self, dim: int) -> bool:
        return False

    def product(self, weight: Tensor, bias: Tensor | None, kind: WeightKind | None, *, wide: bool = False) -> Product:
        product = torch_product(weight, bias, kind)
        return WideProduct(product) if wide else product

    def repacked(self, product: Product) -> Product:
        return product

    def stack(self, layers: Sequence[Any]) -> StackRun | None:
        return None

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, eps)

    def add_norm(self, x: Tensor, update: Tensor, alpha: float, weight: Tensor, eps: float) -> Tensor:
        add_scaled(x, update, alpha)
        return self.norm(x, weight, eps)

    def rotate(self, qkv: Tensor, cosine: Tensor, sine: Tensor, kv: LayerKV, slots: Tensor) -> Tensor:
        kv_heads, _, dim = kv.keys.shape
        split = qkv.view(qkv.shape[0], -1, dim).transpose(0, 1)
        turning, value = split[:-kv_heads], split[-kv_heads:]
        first, second = turning.chunk(2, dim=-1)
        turned = turning * cosine + torch.cat((-second, first), dim=-1) * sine
        kv.write(slots, turned[-kv_heads:], value)
        return turned[:-kv_heads]

    def gated(self, both: Tensor) -> Tensor:
        gate, up = both.chunk(2, dim=-1)
        return F.silu(gate) * up

    def attend_step(
        self, query: Tensor, kv: LayerKV, plan: AttentionPlan, scale: float, window: int | None
    ) -> Tensor | None:
        return None

    def attend(self, query: Tensor, kv: LayerKV, call: ExtentCall, scale: float) -> Tensor:
        raise NotImplementedError("plans for these kernels have no ExtentCall")

    def add_deltas(self, x: Tensor, y: Tensor, context: DeltaContext, parts: Sequence[Part]) -> bool:
        return False
