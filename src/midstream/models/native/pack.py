"""Matrices in the order in which the kernels' products read them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def depth_step(dtype: torch.dtype) -> int:
    """How many neighbours in depth stand side by side for numbers of this type: the depth must be a multiple."""
    return 2 if dtype == torch.bfloat16 else 1


def panels(weight: Tensor, dtype: torch.dtype, columns: int) -> Tensor:
    """A weight [out, in], of products with inputs of `dtype`, in panels [out / columns, in / step, columns, step].

    The last panel is filled up with zeros.
    """
    out, depth = weight.shape
    step = depth_step(dtype)
    whole = F.pad(weight, (0, 0, 0, -out % columns))
    return whole.view(-1, columns, depth // step, step).permute(0, 2, 1, 3).contiguous()
