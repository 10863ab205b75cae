"""The base model's matrix products, by torch: plain, laid out for oneDNN, or with eight-bit weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

WeightKind = Literal["int8"]

# Rows that oneDNN is told to expect when it lays a weight out; a mid-sized step suits both ends.
_EXPECTED_ROWS = 16
_LARGEST = 127


class Int8Weight(NamedTuple):
    """A weight as whole numbers of -127 … 127 [out, in], and what one of them is worth in each output [out]."""

    numbers: Tensor
    scales: Tensor


class Held(NamedTuple):
    """What a product multiplies with: a weight [out, in] in no layout but this, and a bias [out].

    `wide`: its result is of float32, whatever the type of what goes in.
    """

    weight: Tensor | Int8Weight
    bias: Tensor | None
    wide: bool = False


class Product(Protocol):
    """x [..., rows, in] → x Wᵀ + bias [..., rows, out]."""

    def __call__(self, x: Tensor) -> Tensor: ...


class TorchProduct(ABC):
    """A product by torch, from which what it multiplies with can be had again: other kernels may take it over."""

    in_features: int
    dtype: torch.dtype  # of the weight that it was made of

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def held(self) -> Held: ...


class PlainProduct(TorchProduct):
    """For every device and type."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.in_features, self.dtype = weight.shape[1], weight.dtype
        self._weight = weight
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight, self._bias)

    def held(self) -> Held:
        return Held(self._weight, self._bias)


class OneDnnProduct(TorchProduct):
    """With a weight that is laid out once for oneDNN, which halves the time of products with few rows."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.in_features, self.dtype = weight.shape[1], weight.dtype
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _EXPECTED_ROWS)
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.shape[-2]
        padded = padded_rows(rows)
        if padded != rows:
            x = F.pad(x, (0, 0, 0, padded - rows))
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return y if padded == rows else y.narrow(-2, 0, rows)

    def held(self) -> Held:
        return Held(self._weight.to_dense(), self._bias)


class WideProduct(TorchProduct):
    """Another product, with its result in float32."""

    def __init__(self, product: TorchProduct) -> None:
        self.in_features, self.dtype = product.in_features, product.dtype
        self._product = product

    def __call__(self, x: Tensor) -> Tensor:
        return self._product(x).float()

    def held(self) -> Held:
        return self._product.held()._replace(wide=True)


class Int8Product(TorchProduct):
    """Half of bfloat16's memory, on every device; as fast as its products only with kernels of our own."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.in_features, self.dtype = weight.shape[1], weight.dtype
        self._weight = quantized(weight)
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        y = F.linear(x, self._weight.numbers.to(x.dtype)) * self._weight.scales
        return (y if self._bias is None else y + self._bias).to(x.dtype)

    def held(self) -> Held:
        return Held(self._weight, self._bias)


def quantized(weight: Tensor) -> Int8Weight:
    """Round each output's weights to 127ths of the largest: float32 scales."""
    exact = weight.detach().float()
    scales = exact.abs().amax(dim=1) / _LARGEST
    scales = torch.where(scales > 0, scales, 1.0)
    return Int8Weight((exact / scales[:, None]).round().to(torch.int8), scales)


def torch_product(weight: Tensor, bias: Tensor | None, kind: WeightKind | None) -> TorchProduct:
    """The fastest that torch has for this weight [out, in]."""
    if kind == "int8":
        return Int8Product(weight, bias)
    return OneDnnProduct(weight, bias) if can_pack(weight.dtype, weight.device) else PlainProduct(weight, bias)


def padded_rows(rows: int) -> int:
    """The number of rows that oneDNN's products are computed with.

    oneDNN makes and keeps a kernel for every number of rows that it meets: over all up to 512 they take 460 MB, over
    these some 170 MB, and fewer have to be made. The rows added cost little beside the reading of the weights.
    """
    if rows <= 16:
        return rows
    step = 4 if rows <= 64 else 8 if rows <= 256 else 16
    return -(-rows // step) * step


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether oneDNN has native products of this type on this processor."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32
