"""What the tests of the kernels share: the compiled ones, attention over extents by its definition, bounds."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from midstream.models.attention import attend_by_definition
from midstream.models.attention_plan import Rows
from midstream.models.extents import ExtentCall
from midstream.models.kernels import Kernels, TorchKernels
from midstream.models.kv import KVKind, LayerKV, rounded
from midstream.models.load import LoadedModel
from midstream.models.native.kernels import HEAD_DIMS, NativeKernels, start_kernels
from midstream.models.native.pack import depth_step
from midstream.models.native.products import PackedProduct
from midstream.models.products import Held, WeightKind, quantized
from midstream.models.stack import FusedStack

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="needs a C++ compiler: one of g++, clang++, c++"
)
DTYPES = (torch.float32, torch.bfloat16)
KV_KINDS: tuple[KVKind | None, ...] = (None, "int8")
# The kernels that a model may run on, whatever this machine's processor: torch's; the compiled ones layer by layer, as
# where registers are narrow; all layers in one call.
KERNELS = [
    pytest.param("torch"),
    pytest.param("layers", marks=needs_compiler),
    pytest.param("stack", marks=needs_compiler),
]


def native(dtype: torch.dtype = torch.float32) -> NativeKernels:
    """For heads of every size."""
    kernels = start_kernels(dtype, torch.device("cpu"), HEAD_DIMS).result()
    assert isinstance(kernels, NativeKernels)
    return kernels


class UnpackedKernels(NativeKernels):
    """As on a processor whose registers are narrow: the products are torch's."""

    def _packs(self, depth: int) -> bool:
        return False


class PackedKernels(NativeKernels):
    """As on a processor whose registers are wide: every product of even depth is packed."""

    def _packs(self, depth: int) -> bool:
        return depth % depth_step(self._dtype) == 0


def packed(
    weight: Tensor, bias: Tensor | None = None, kind: WeightKind | None = None, *, wide: bool = False
) -> PackedProduct:
    """On any processor, wide registers or not."""
    held = Held(weight if kind is None else quantized(weight), bias, wide)
    return PackedProduct(native(weight.dtype)._library, weight.dtype, held)


def kernels_named(name: str, dtype: torch.dtype = torch.float32) -> Kernels:
    """One of KERNELS."""
    if name == "torch":
        return TorchKernels()
    return (UnpackedKernels if name == "layers" else PackedKernels)(native(dtype)._library, dtype, HEAD_DIMS)


def decoder_layers(loaded: LoadedModel) -> list[nn.Module]:
    """The model's layers, be they in a stack or not."""
    layers = list(loaded.model.model.layers)
    return list(layers[0].layers) if isinstance(layers[0], FusedStack) else layers


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_follows(found: Tensor, expected: Tensor, *, rtol: float = 1e-5, atol: float = 1e-5) -> None:
    """`found` is `expected` (of at least float32) but for float32's errors and, in bfloat16, one rounding."""
    if found.dtype == torch.bfloat16:
        rtol += 2.0**-8
    assert found.shape == expected.shape
    torch.testing.assert_close(found.double(), expected.double(), rtol=rtol, atol=atol, equal_nan=True)


class PlainKernels(TorchKernels):
    """With attention over extents, row by row and from what a call says of its chunks and blocks alone."""

    def supports(self, dim: int) -> bool:
        return True

    def attend(self, query: Tensor, kv: LayerKV, call: ExtentCall, scale: float) -> Tensor:
        """Rows that are not in the call get nought."""
        heads, rows, dim = query.shape
        group = heads // kv.keys.shape[0]
        out = query.new_zeros(rows, heads, dim)
        for row in rows_in(call):
            found = kv.read(torch.tensor(seen_by(call, row)), query.dtype)
            k, v = (tensor.repeat_interleave(group, 0) for tensor in found)
            out[row] = attend_by_definition(query[:, row : row + 1], k, v, None, False, scale)[0][:, 0]
        return out


def plain(kv: LayerKV) -> LayerKV:
    """The same as numbers of float32."""
    keys, values = kv.read(slice(None), torch.float32)
    return LayerKV(keys.float(), values.float())


def held(keys: Tensor, values: Tensor, kind: KVKind | None) -> LayerKV:
    """As a pool of that kind holds them; a slot of NaN becomes one of large numbers that are worth NaN."""
    if kind is None:
        return LayerKV(keys, values)
    numbers, scales = zip(*map(rounded, (keys, values)), strict=True)
    for whole, worth in zip(numbers, scales, strict=True):
        whole[worth.isnan()] = 127
    return LayerKV(*numbers, *scales)


def assert_attends(found: Tensor, query: Tensor, kv: LayerKV, call: ExtentCall, scale: float) -> None:
    """`found` is the attention of the call's rows but for float32's errors; in bfloat16, for two roundings more.

    Of the result, and of each weight: half of the last of 8 bits.
    """
    rows, kernels = rows_in(call), PlainKernels()
    keys, values, *_ = plain(kv)
    expected = kernels.attend(query.float(), LayerKV(keys, values), call, scale)[rows]
    error = (found[rows].float() - expected).abs()
    bound = 1e-5 + 1e-5 * expected.abs()
    if found.dtype == torch.bfloat16:
        sizes = kernels.attend(query.float(), LayerKV(keys, values.abs()), call, scale)[rows]
        bound += 2.0**-8 * (expected.abs() + sizes)
    assert found.shape == (query.shape[1], query.shape[0], query.shape[2])
    assert bool((error <= bound).all()), f"an error of {float((error / bound).max())} times the bound"


def numbers(rows: Rows) -> list[int]:
    if isinstance(rows.selector, slice):
        return list(range(rows.selector.start, rows.selector.stop))
    return rows.selector.tolist()


def rows_in(call: ExtentCall) -> list[int]:
    """The rows of the batch that a call serves."""
    in_blocks = [row + i for row, count, *_ in call.blocks.tolist() for i in range(count)]
    return sorted([*call.merge_rows.tolist(), *in_blocks])


def seen_by(call: ExtentCall, row: int) -> list[int]:
    """The slots that a row sees, chunk after chunk, and span after span."""
    slots: list[int] = []
    for start, length, first, count, causal, _ in call.chunks.tolist():
        rows = call.chunk_rows[first : first + count].tolist()
        if row in rows:
            hidden = count - 1 - rows.index(row) if causal else 0
            slots.extend(range(start, start + length - hidden))
    for first_row, count, position, first, spans in call.blocks.tolist():
        if first_row <= row < first_row + count:
            last = position + row - first_row
            lowest = 0 if call.window is None else last - call.window + 1
            for start, length, at in call.spans[first : first + spans].tolist():
                slots.extend(start + i for i in range(length) if lowest <= at + i <= last)
    return slots
