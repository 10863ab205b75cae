"""The base model's matrix products by the compiled kernels."""

from __future__ import annotations

import ctypes
from ctypes import byref

import torch
from torch import Tensor

from midstream.models.native import structs
from midstream.models.native.pack import panels
from midstream.models.products import Held, Int8Weight


class PackedProduct:
    """With a weight in panels, of its own type or of eight bits. `weight` is what the kernels get of it."""

    def __init__(self, library: ctypes.PyDLL, dtype: torch.dtype, held: Held) -> None:
        """Of inputs of `dtype`, which is what the library is compiled for."""
        weight, bias, wide = held
        numbers, scales = weight if isinstance(weight, Int8Weight) else (weight, None)
        self._multiply = library.midstream_product
        self.out_features, self.in_features = numbers.shape
        self._panels = panels(numbers, dtype, library.midstream_panel())
        self._scales, self._bias = scales, bias
        pointers = (None if t is None else t.data_ptr() for t in (self._panels, bias, scales))
        self.weight = structs.Weight(*pointers, self.in_features, self.out_features, wide)
        self._dtype = torch.float32 if wide else dtype

    def __call__(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        y = torch.empty(*x.shape[:-1], self.out_features, dtype=self._dtype)
        pointers = (ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()))
        rows = ctypes.c_int64(x.numel() // self.in_features)
        self._multiply(byref(self.weight), *pointers, rows, torch.get_num_threads())
        return y
