"""The adapter rows of a forward: which rows of the batch get whose low-rank deltas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from midstream.adapters.weights import LoraWeights


class Part(NamedTuple):
    """A linear layer in a product that joins several: its module path, and its columns of the output."""

    path: str
    offset: int
    out: int


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
    """The adapter rows of the current forward; one object shared by all layers of a model, set by the runner.

    `tables` is what kernels keep for these adapters in this order, `owned` for these rows too.
    """

    groups: tuple[DeltaGroup, ...] = ()
    batched: bool = False
    gather: Tensor | None = None
    valid: Tensor | None = None
    key: tuple[str, ...] = ()
    stacks: dict[str, tuple[Tensor, Tensor] | None] = field(default_factory=dict)
    tables: dict[Any, Any] = field(default_factory=dict)
    owned: dict[Any, Any] = field(default_factory=dict)

    def set(self, groups: Sequence[DeltaGroup]) -> None:
        """Prepare a forward. Groups are contiguous in the batch, one after the other."""
        self.groups = tuple(groups)
        self.owned = {}
        self.gather = self.valid = None
        self.batched = False
        if not groups:
            return
        key = tuple(group.digest for group in groups)
        if key != self.key:
            self.key, self.stacks, self.tables = key, {}, {}
        widest = max(group.count for group in groups)
        total = sum(group.count for group in groups)
        # One batched product pays while padding to the widest group costs less than the calls it saves.
        self.batched = len(groups) > 1 and widest * len(groups) <= max(2 * total, 64)
        if self.batched and widest * len(groups) != total:
            rows = [[min(g.start + i, g.end - 1) for i in range(widest)] for g in groups]
            valid = [n * widest + i for n, g in enumerate(groups) for i in range(g.count)]
            device = next(iter(groups[0].weights.values())).a.device
            self.gather = torch.tensor(rows, device=device).flatten()
            self.valid = torch.tensor(valid, device=device)

    def add(self, x: Tensor, y: Tensor, parts: Sequence[Part]) -> None:
        """Add the deltas to y [rows, out] of x [rows, in], by torch's own products."""
        for part in parts:
            columns = y if part.out == y.shape[1] else y[:, part.offset : part.offset + part.out]
            stack = self._stack(part.path) if self.batched else None
            if stack is not None:
                self._add_batched(x, columns, *stack)
                continue
            for group in self.groups:
                weights = group.weights.get(part.path)
                if weights is not None:
                    delta = F.linear(F.linear(x[group.start : group.end], weights.a), weights.b)
                    columns[group.start : group.end].add_(delta, alpha=weights.scale)

    def _add_batched(self, x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> None:
        start, end = self.groups[0].start, self.groups[-1].end
        rows = x[start:end] if self.gather is None else x.index_select(0, self.gather)
        delta = torch.bmm(torch.bmm(rows.view(len(self.groups), -1, x.shape[-1]), a), b).flatten(0, 1)
        if self.valid is not None:
            delta = delta.index_select(0, self.valid)
        y[start:end] += delta

    def _stack(self, path: str) -> tuple[Tensor, Tensor] | None:
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
