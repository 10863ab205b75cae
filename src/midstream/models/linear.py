"""Linear layers that add, for the rows that an adapter owns, that adapter's low-rank delta."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from midstream.adapters.weights import LoraWeights

# Rows that oneDNN is told to expect when it lays a weight out; a mid-sized step suits both ends.
_EXPECTED_ROWS = 16


@dataclass(frozen=True, slots=True)
class DeltaGroup:
    """Rows `start` … `end` of the batch belong to the adapter with these weights, by module path."""

    digest: str
    start: int
    end: int
    weights: Mapping[str, LoraWeights]

    @property
    def count(self) -> int:
        return self.end - self.start


@dataclass(slots=True)
class DeltaContext:
    """The adapter rows of the current forward; one object shared by all layers of a model, set by the runner."""

    groups: tuple[DeltaGroup, ...] = ()
    batched: bool = False
    gather: Tensor | None = None
    valid: Tensor | None = None
    key: tuple[str, ...] = ()
    stacks: dict[str, tuple[Tensor, Tensor] | None] = field(default_factory=dict)

    def set(self, groups: Sequence[DeltaGroup]) -> None:
        """Prepare a forward. Groups are contiguous in the batch, one after the other."""
        self.groups = tuple(groups)
        self.gather = self.valid = None
        self.batched = False
        if len(groups) < 2:
            return
        widest = max(group.count for group in groups)
        total = sum(group.count for group in groups)
        # One batched product pays while padding to the widest group costs less than the calls it saves.
        self.batched = widest * len(groups) <= max(2 * total, 64)
        if not self.batched:
            return
        key = tuple(group.digest for group in groups)
        if key != self.key:
            self.key, self.stacks = key, {}
        if widest * len(groups) != total:
            rows = [[min(g.start + i, g.end - 1) for i in range(widest)] for g in groups]
            valid = [n * widest + i for n, g in enumerate(groups) for i in range(g.count)]
            device = next(iter(groups[0].weights.values())).a.device
            self.gather = torch.tensor(rows, device=device).flatten()
            self.valid = torch.tensor(valid, device=device)

    def stack(self, path: str) -> tuple[Tensor, Tensor] | None:
        """A [groups, in, rank] and B [groups, rank, out] (scaled) of a module, ranks padded with zeros.

        None where not every adapter of the step adapts the module.
        """
        if path not in self.stacks:
            self.stacks[path] = self._make_stack(path)
        return self.stacks[path]

    def _make_stack(self, path: str) -> tuple[Tensor, Tensor] | None:
        found = [group.weights.get(path) for group in self.groups]
        weights = [w for w in found if w is not None]
        if len(weights) < len(found):
            return None
        rank = max(w.a.shape[0] for w in weights)
        a = torch.stack([F.pad(w.a, (0, 0, 0, rank - w.a.shape[0])).t() for w in weights])
        b = torch.stack([F.pad(w.b * w.scale, (0, rank - w.b.shape[1])).t() for w in weights])
        return a.contiguous(), b.contiguous()


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
    """A linear layer of the base model plus the deltas of the step's adapters for the rows they own.

    On a CPU the weight is laid out once for oneDNN, which halves the time of products with few rows; the layer then
    has no plain weight any more.
    """

    def __init__(self, base: nn.Linear, path: str, context: DeltaContext, *, pack: bool) -> None:
        super().__init__()
        self.path = path
        self.context = context
        self.in_features, self.out_features = base.in_features, base.out_features
        self.bias = base.bias
        self.packed: Tensor | None = None
        self.weight: Tensor | None = None
        if pack:
            self.packed = torch.ops.mkldnn._reorder_linear_weight(base.weight.detach(), _EXPECTED_ROWS)
        else:
            self.weight = base.weight

    def forward(self, x: Tensor) -> Tensor:
        """x [..., rows, in] → [..., rows, out]."""
        if self.packed is not None:
            y = self._packed_product(x, self.packed)
        else:
            assert self.weight is not None
            y = F.linear(x, self.weight, self.bias)
        if self.context.groups:
            self._add_deltas(x.reshape(-1, self.in_features), y.view(-1, self.out_features))
        return y

    def _packed_product(self, x: Tensor, packed: Tensor) -> Tensor:
        rows = x.shape[-2]
        padded = padded_rows(rows)
        if padded != rows:
            x = F.pad(x, (0, 0, 0, padded - rows))
        y = torch.ops.mkldnn._linear_pointwise(x, packed, self.bias, "none", [], "")
        return y if padded == rows else y.narrow(-2, 0, rows)

    def _add_deltas(self, x: Tensor, y: Tensor) -> None:
        context = self.context
        stack = context.stack(self.path) if context.batched else None
        if stack is not None:
            self._add_batched(x, y, *stack)
            return
        for group in context.groups:
            weights = group.weights.get(self.path)
            if weights is not None:
                delta = F.linear(F.linear(x[group.start : group.end], weights.a), weights.b)
                y[group.start : group.end].add_(delta, alpha=weights.scale)

    def _add_batched(self, x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> None:
        groups = self.context.groups
        start, end = groups[0].start, groups[-1].end
        rows = x[start:end] if self.context.gather is None else x.index_select(0, self.context.gather)
        delta = torch.bmm(torch.bmm(rows.view(len(groups), -1, x.shape[-1]), a), b).flatten(0, 1)
        if self.context.valid is not None:
            delta = delta.index_select(0, self.context.valid)
        y[start:end] += delta


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether oneDNN has native products of this type on this processor."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def wrap_linears(model: nn.Module, context: DeltaContext, *, pack: bool) -> dict[str, tuple[int, int]]:
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
                setattr(parent, name, AdapterLinear(module, path, DeltaContext(), pack=True))
            continue
        shapes[path] = (module.out_features, module.in_features)
        setattr(parent, name, AdapterLinear(module, path, context, pack=pack))
    return shapes
