"""The base model's matrix products by the compiled kernels."""

from __future__ import annotations

import ctypes
from ctypes import byref

import torch
from torch import Tensor

from midstream.models.native import structs
from midstream.models.native.pack import panels
from midstream.models.products import WeightKind, quantized


class PackedProduct:
    """With a weight in panels, of its own type or of eight bits. `weight` is what the kernels get of it."""

    def __init__(
        self,
        library: ctypes.PyDLL,
        type_code: int,
        weight: Tensor,
        bias: Tensor | None,
        kind: WeightKind | None,
        *,
        wide: bool,
    ) -> None:
        self._multiply = library.midstream_product
        self._type_code = type_code
        self.out_features, self.in_features = weight.shape
        numbers, scales = (weight, None) if kind is None else quantized(weight)
        self._panels = panels(numbers, weight.dtype, library.midstream_panel())
        self._scales, self._bias = scales, bias
        pointers = (None if t is None else t.data_ptr() for t in (self._panels, bias, scales))
        self.weight = structs.Weight(*pointers, self.in_features, self.out_features, wide)
        self._dtype = torch.float32 if wide else weight.dtype

    def __call__(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        y = torch.empty(*x.shape[:-1], self.out_features, dtype=self._dtype)
        pointers = (ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()))
        rows = ctypes.c_int64(x.numel() // self.in_features)
        self._multiply(byref(self.weight), *pointers, rows, torch.get_num_threads(), self._type_code)
        return y
