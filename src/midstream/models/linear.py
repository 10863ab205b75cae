"""Linear layers that add, for the rows that an adapter owns, that adapter's low-rank delta."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from midstream.models.deltas import DeltaContext, Part
from midstream.models.kernels import Kernels
from midstream.models.products import Product, WeightKind


class AdapterLinear(nn.Module):
    """Linear layers of the base model that read the same input, as one product, plus the step's adapters' deltas.

    The product keeps the weight as it needs it: the layer has no plain weight any more.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Linear],
        context: DeltaContext,
        kernels: Kernels,
        kind: WeightKind | None = None,
        *,
        wide: bool = False,
    ) -> None:
        """`layers` by module path; their outputs stand side by side, in this order; `wide`: in float32."""
        super().__init__()
        self.context = context
        self.kernels = kernels
        self.parts = _parts(layers)
        self.in_features = next(iter(layers.values())).in_features
        self.out_features = sum(part.out for part in self.parts)
        weight = _joined([layer.weight for layer in layers.values()], self.parts)
        assert weight is not None
        bias = _joined([layer.bias for layer in layers.values()], self.parts)
        self.product: Product = kernels.product(
            weight.detach(), None if bias is None else bias.detach(), kind, wide=wide
        )

    def use(self, kernels: Kernels, product: Product) -> None:
        """Go on with other kernels, and the same product as they compute it."""
        self.kernels, self.product = kernels, product

    def forward(self, x: Tensor) -> Tensor:
        """x [..., rows, in] → [..., rows, out]."""
        y = self.product(x)
        if self.context.groups:
            flat_x, flat_y = x.reshape(-1, self.in_features), y.view(-1, self.out_features)
            if not self.kernels.add_deltas(flat_x, flat_y, self.context, self.parts):
                self.context.add(flat_x, flat_y, self.parts)
        return y


def _parts(layers: Mapping[str, nn.Linear]) -> tuple[Part, ...]:
    parts: list[Part] = []
    for path, layer in layers.items():
        offset = parts[-1].offset + parts[-1].out if parts else 0
        parts.append(Part(path, offset, layer.out_features))
    return tuple(parts)


def _joined(tensors: Sequence[Tensor | None], parts: Sequence[Part]) -> Tensor | None:
    """Weights or biases one below the other; a missing bias beside others is zero."""
    found = [tensor for tensor in tensors if tensor is not None]
    if len(tensors) == 1 or not found:
        return tensors[0]
    filled = [
        found[0].new_zeros(part.out) if tensor is None else tensor for tensor, part in zip(tensors, parts, strict=True)
    ]
    return torch.cat(filled).detach()


def linear_shapes(module: nn.Module) -> dict[str, tuple[int, int]]:
    """(out, in) of the linear layers below a module, by path."""
    return {
        path: (child.out_features, child.in_features)
        for path, child in module.named_modules()
        if type(child) is nn.Linear
    }


def wrap_linears(
    model: nn.Module, context: DeltaContext, kernels: Kernels, kind: WeightKind | None
) -> dict[str, tuple[int, int]]:
    """Put an AdapterLinear in place of every nn.Linear; return the paths and (out, in) of all but the output head.

    No adapter changes the head, and its logits are of float32. It keeps its plain weight where that is the embedding.
    """
    shapes: dict[str, tuple[int, int]] = {}
    for path, module in list(model.named_modules()):
        if type(module) is not nn.Linear:
            continue
        parent = model.get_submodule(path.rpartition(".")[0])
        head = path == "lm_head"
        if not head:
            shapes[path] = (module.out_features, module.in_features)
        linear = AdapterLinear({path: module}, DeltaContext() if head else context, kernels, kind, wide=head)
        setattr(parent, path.rpartition(".")[2], linear)
    return shapes
