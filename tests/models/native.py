"""What the tests of the kernels share: the compiled ones, attention over extents by its definition, bounds."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor

from midstream.models.attention import attend_by_definition
from midstream.models.extents import ExtentCall, Rows
from midstream.models.kernels import TorchKernels
from midstream.models.native.kernels import NativeKernels, pick_kernels

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="needs a C++ compiler: one of g++, clang++, c++"
)
DTYPES = (torch.float32, torch.bfloat16)


def native(dtype: torch.dtype = torch.float32) -> NativeKernels:
    kernels = pick_kernels(dtype, torch.device("cpu"))
    assert isinstance(kernels, NativeKernels)
    return kernels


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_follows(found: Tensor, expected: Tensor, *, rtol: float = 1e-5, atol: float = 1e-5) -> None:
    """`found` is `expected` (of at least float32) but for float32's errors and, in bfloat16, one rounding."""
    if found.dtype == torch.bfloat16:
        rtol += 2.0**-8
    assert found.shape == expected.shape
    torch.testing.assert_close(found.double(), expected.double(), rtol=rtol, atol=atol, equal_nan=True)


class PlainKernels(TorchKernels):
    """With attention over extents, row by row and from what a call says of its chunks alone."""

    few_queries = 32

    def supports(self, dim: int) -> bool:
        return True

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, call: ExtentCall, scale: float
    ) -> tuple[Tensor, Tensor]:
        heads, _, dim = query.shape
        group = heads // keys.shape[0]
        out = query.new_empty(call.rows.total, heads, dim)
        lse = torch.empty(heads, call.rows.total)
        for place, row in enumerate(numbers(call.rows)):
            slots = seen_by(call, row)
            k, v = (tensor[:, slots].repeat_interleave(group, 0) for tensor in (keys, values))
            one_out, one_lse = attend_by_definition(query[:, row : row + 1], k, v, None, False, scale)
            out[place], lse[:, place] = one_out[:, 0], one_lse[:, 0]
        return out, lse


def numbers(rows: Rows) -> list[int]:
    if isinstance(rows.selector, slice):
        return list(range(rows.selector.start, rows.selector.stop))
    return rows.selector.tolist()


def seen_by(call: ExtentCall, row: int) -> list[int]:
    """The slots that a row sees, chunk after chunk."""
    slots: list[int] = []
    for start, length, first, count, causal, _ in call.chunks.tolist():
        rows = call.chunk_rows[first : first + count].tolist()
        if row in rows:
            hidden = count - 1 - rows.index(row) if causal else 0
            slots.extend(range(start, start + length - hidden))
    return slots
