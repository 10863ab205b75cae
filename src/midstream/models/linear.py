"""Linear layers that add, for the rows that an adapter owns, that adapter's low-rank delta."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from midstream.models.deltas import DeltaContext, Part
from midstream.models.kernels import Kernels, TorchKernels

# Rows that oneDNN is told to expect when it lays a weight out; a mid-sized step suits both ends.
_EXPECTED_ROWS = 16


def padded_rows(rows: int) -> int:
    """The number of rows that a product is computed with.

    oneDNN makes and keeps a kernel for every number of rows that it meets: over all up to 512 they take 460 MB, over
    these some 170 MB, and fewer have to be made. The rows added cost little beside the reading of the weights.
    """
    if rows <= 16:
        return rows
    step = 4 if rows <= 64 else 8 if rows <= 256 else 16
    return -(-rows // step) * step


class AdapterLinear(nn.Module):
    """Linear layers of the base model that read the same input, as one product, plus the step's adapters' deltas.

    On a CPU the weight is laid out once for oneDNN, which halves the time of products with few rows; the layer then
    has no plain weight any more.
    """

    def __init__(
        self, layers: Mapping[str, nn.Linear], context: DeltaContext, *, pack: bool, kernels: Kernels | None = None
    ) -> None:
        """`layers` by module path; their outputs stand side by side, in this order."""
        super().__init__()
        self.context = context
        self.kernels = kernels or TorchKernels()
        self.parts = _parts(layers)
        self.in_features = next(iter(layers.values())).in_features
        self.out_features = sum(part.out for part in self.parts)
        self.bias = _joined([layer.bias for layer in layers.values()], self.parts)
        weight = _joined([layer.weight for layer in layers.values()], self.parts)
        assert weight is not None
        self.packed: Tensor | None = None
        self.weight: Tensor | None = None
        if pack:
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _EXPECTED_ROWS)
        else:
            self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        """x [..., rows, in] → [..., rows, out]."""
        if self.packed is not None:
            y = self._packed_product(x, self.packed)
        else:
            assert self.weight is not None
            y = F.linear(x, self.weight, self.bias)
        if self.context.groups:
            flat_x, flat_y = x.reshape(-1, self.in_features), y.view(-1, self.out_features)
            if not self.kernels.add_deltas(flat_x, flat_y, self.context, self.parts):
                self.context.add(flat_x, flat_y, self.parts)
        return y

    def _packed_product(self, x: Tensor, packed: Tensor) -> Tensor:
        rows = x.shape[-2]
        padded = padded_rows(rows)
        if padded != rows:
            x = F.pad(x, (0, 0, 0, padded - rows))
        y = torch.ops.mkldnn._linear_pointwise(x, packed, self.bias, "none", [], "")
        return y if padded == rows else y.narrow(-2, 0, rows)


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


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether oneDNN has native products of this type on this processor."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def linear_shapes(module: nn.Module) -> dict[str, tuple[int, int]]:
    """(out, in) of the linear layers below a module, by path."""
    return {
        path: (child.out_features, child.in_features)
        for path, child in module.named_modules()
        if type(child) is nn.Linear
    }


def wrap_linears(
    model: nn.Module, context: DeltaContext, *, pack: bool, kernels: Kernels
) -> dict[str, tuple[int, int]]:
    """Put an AdapterLinear in place of every nn.Linear but the output head; return their paths and (out, in).

    The head is only packed, and keeps its plain weight where it is the embedding too.
    """
    shapes: dict[str, tuple[int, int]] = {}
    for path, module in list(model.named_modules()):
        if type(module) is not nn.Linear:
            continue
        parent = model.get_submodule(path.rpartition(".")[0])
        name = path.rpartition(".")[2]
        if path == "lm_head":
            if pack:
                setattr(parent, name, AdapterLinear({path: module}, DeltaContext(), pack=True))
            continue
        shapes[path] = (module.out_features, module.in_features)
        setattr(parent, name, AdapterLinear({path: module}, context, pack=pack, kernels=kernels))
    return shapes
