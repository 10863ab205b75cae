"""One layer's keys and values, as the pool holds them."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

KVKind = Literal["int8"]

_LARGEST = 127


class LayerKV(NamedTuple):
    """Keys and values [kv_heads, slots, dim], of the model's type.

    Or whole numbers of -127 … 127, with what one of them is worth in each head's slot: float32 [kv_heads, slots].
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None

    @classmethod
    def empty(
        cls, heads: int, slots: int, dim: int, dtype: torch.dtype, device: torch.device, kind: KVKind | None
    ) -> LayerKV:
        """Not zeroed: pages that no request has used yet take no memory. `kind` None: numbers of `dtype`."""
        numbers = dtype if kind is None else torch.int8
        keys, values = (torch.empty(heads, slots, dim, dtype=numbers, device=device) for _ in range(2))
        if kind is None:
            return cls(keys, values)
        return cls(keys, values, *(torch.empty(heads, slots, device=device) for _ in range(2)))

    def write(self, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Put key and value [kv_heads, rows, dim] into `slots` [rows], rounded where numbers are whole."""
        for numbers, scales, new in ((self.keys, self.key_scales, key), (self.values, self.value_scales, value)):
            if scales is None:
                numbers.index_copy_(1, slots, new)
            else:
                whole, worth = rounded(new)
                numbers.index_copy_(1, slots, whole)
                scales.index_copy_(1, slots, worth)

    def read(self, where: slice | Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values [kv_heads, …, dim] of some slots; whole numbers as what they are worth, in `dtype`."""
        return (
            _worth(self.keys, self.key_scales, where, dtype),
            _worth(self.values, self.value_scales, where, dtype),
        )


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors [..., dim] as 127ths of their largest magnitude, which is the scale [...]; NaN where it is not finite."""
    exact = x.float()
    scales = exact.abs().amax(dim=-1) / _LARGEST
    scales = torch.where(scales.isfinite(), scales, torch.nan)
    # A scale so small that it is of few bits would give larger numbers.
    numbers = (exact / torch.where(scales > 0, scales, torch.inf)[..., None]).round().clamp(-_LARGEST, _LARGEST)
    return numbers.nan_to_num(0.0).to(torch.int8), scales


def bytes_per_slot(shape: tuple[int, int], dtype: torch.dtype, kind: KVKind | None) -> int:
    """Bytes of one token's keys and values in a layer of `shape` (KV heads, size of each)."""
    heads, dim = shape
    vector = dim * dtype.itemsize if kind is None else dim * torch.int8.itemsize + torch.float32.itemsize
    return 2 * heads * vector


def _worth(numbers: Tensor, scales: Tensor | None, where: slice | Tensor, dtype: torch.dtype) -> Tensor:
    found = _at(numbers, where)
    return found if scales is None else (found * _at(scales, where)[..., None]).to(dtype)


def _at(tensor: Tensor, where: slice | Tensor) -> Tensor:
    return tensor.index_select(1, where) if isinstance(where, Tensor) else tensor[:, where]
