"""LoRA on the CPU by groups of rows: the base model's rows are left alone, and each adapter's are one product.

Stock vLLM gathers an adapter's weights for each token, and a row of the base model, whose number is -1, gathers the
last adapter's. These are methods of `PunicaWrapperCPU`, and `self` is one. Stacked weights are [slots, 1, out, in].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# The rows of one adapter: a range where they lie side by side, else their numbers.
Rows = slice | Tensor
Groups = list[tuple[int, Rows]]


def group(slots: Tensor) -> Groups:
    """(slot, rows) of each adapter among rows with these slot numbers, where a negative one is the base model's."""
    groups: Groups = []
    for slot in torch.unique(slots).tolist():
        if slot < 0:
            continue
        rows = torch.nonzero(slots == slot).view(-1)
        first, last = int(rows[0]), int(rows[-1])
        groups.append((slot, slice(first, last + 1) if last - first + 1 == len(rows) else rows))
    return groups


def note_groups(self: Any) -> None:
    """Group the tokens and the sampled rows of a step, once for all layers."""
    self.midstream_tokens = group(self.token_lora_indices)
    self.midstream_samples = group(self.sampler_indices)


def add_lora_linear(
    self: Any,
    y: Tensor,
    x: Tensor,
    lora_a_stacked: tuple[Tensor, ...],
    lora_b_stacked: tuple[Tensor, ...],
    scale: float,
    output_slices: tuple[int, ...],
    *,
    buffer: tuple[Tensor, ...] | None = None,
    **kwargs: Any,
) -> None:
    """y[rows, slice] += scale · x[rows] Aᵀ Bᵀ for each adapter's rows and each slice of the output."""
    y, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
    for slot, rows in self.midstream_tokens:
        chosen, offset = x[rows], 0
        for a, b, width in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
            _add(y[:, offset : offset + width], rows, _scaled(chosen @ a[slot, 0].t(), scale), b[slot, 0])
            offset += width


def add_shrink(
    self: Any,
    y: tuple[Tensor, ...] | Tensor,
    x: Tensor,
    lora_a_stacked: tuple[Tensor, ...],
    scale: float,
    **kwargs: Any,
) -> None:
    """y[i][rows] += scale · x[rows] A_iᵀ."""
    x = x.view(-1, x.shape[-1])
    for out, a in zip(y, lora_a_stacked, strict=False):
        flat = out.view(-1, out.shape[-1])
        for slot, rows in self.midstream_tokens:
            product = _scaled(x[rows] @ a[slot, 0].t(), scale).to(flat.dtype)
            flat[rows, : product.shape[-1]] += product


def add_expand(
    self: Any,
    y: Tensor,
    x: tuple[Tensor, ...] | Tensor,
    lora_b_stacked: tuple[Tensor, ...],
    output_slices: tuple[int, ...],
    offset_start: int = 0,
    add_inputs: bool = True,
    **kwargs: Any,
) -> None:
    """y[rows, slice i] += x[i][rows] B_iᵀ, or = where nothing is to be added to."""
    y, offset = y.view(-1, y.shape[-1]), offset_start
    for low, b, width in zip(x, lora_b_stacked, output_slices, strict=False):
        _expand(y[:, offset : offset + width], low, b, self.midstream_tokens, add=add_inputs)
        offset += width


def add_lora_embedding(
    self: Any, y: Tensor, x: Tensor, lora_b_stacked: Tensor, add_inputs: bool = True, **kwargs: Any
) -> None:
    """y[rows] += x[rows] Bᵀ: the embedding has looked A up already."""
    _expand(y.view(-1, y.shape[-1]), x, lora_b_stacked, self.midstream_tokens, add=add_inputs)


def add_lora_logits(
    self: Any,
    y: Tensor,
    x: Tensor,
    lora_a_stacked: Tensor,
    lora_b_stacked: Tensor,
    scale: float,
    *,
    buffer: Tensor | None = None,
    **kwargs: Any,
) -> None:
    """The same as for a linear layer, for the rows that are sampled."""
    y, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
    for slot, rows in self.midstream_samples:
        b = lora_b_stacked[slot, 0]
        _add(y[:, : b.shape[0]], rows, _scaled(x[rows] @ lora_a_stacked[slot, 0].t(), scale), b)


def _expand(y: Tensor, x: Tensor, b: Tensor, groups: Groups, *, add: bool) -> None:
    flat = x.view(-1, x.shape[-1])
    for slot, rows in groups:
        weights = b[slot, 0]
        if not add:
            y[rows] = 0
        _add(y, rows, flat[rows][:, : weights.shape[-1]].to(weights.dtype), weights)


def _add(y: Tensor, rows: Rows, low: Tensor, b: Tensor) -> None:
    """y[rows] += low Bᵀ, in place."""
    if isinstance(rows, slice):
        part = y[rows]
        part.addmm_(low.to(part.dtype), b.t().to(part.dtype))
    else:
        y.index_add_(0, rows, (low @ b.t()).to(y.dtype))


def _scaled(product: Tensor, scale: float) -> Tensor:
    return product if scale == 1.0 else product * scale
