"""LoRA by groups of rows, against one row after the other."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from midstream_vllm import kernels

SLOTS, RANK, WIDTH = 3, 4, 6
OUTS = (5, 2)
MIXED = [-1, 0, 0, 2, -1, 2, 0]


def weights() -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    torch.manual_seed(0)
    a = tuple(torch.randn(SLOTS, 1, RANK, WIDTH) for _ in OUTS)
    return a, tuple(torch.randn(SLOTS, 1, out, RANK) for out in OUTS)


def wrapper(slots: list[int]) -> SimpleNamespace:
    found = SimpleNamespace(token_lora_indices=torch.tensor(slots), sampler_indices=torch.tensor(slots))
    kernels.note_groups(found)
    return found


def by_row(slots: list[int], x: Tensor, scale: float) -> Tensor:
    a, b = weights()
    found = torch.zeros(len(slots), sum(OUTS))
    for row, slot in enumerate(slots):
        if slot >= 0:
            found[row] = torch.cat([scale * b[i][slot, 0] @ (a[i][slot, 0] @ x[row]) for i in range(len(OUTS))])
    return found


@pytest.mark.parametrize("slots", [[-1, -1], [1], [-1, 1, 1], MIXED, [2, 1, 0], [0, 0, 0, -1]])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_each_row_gets_its_own_adapter_and_base_rows_none(slots: list[int], scale: float) -> None:
    a, b = weights()
    x, y = torch.randn(len(slots), WIDTH), torch.randn(len(slots), sum(OUTS))
    expected = y + by_row(slots, x, scale)
    kernels.add_lora_linear(wrapper(slots), y, x, a, b, scale, OUTS)
    torch.testing.assert_close(y, expected)


def test_shrink_and_expand_give_the_same_as_both_at_once() -> None:
    a, b = weights()
    x, y = torch.randn(len(MIXED), WIDTH), torch.randn(len(MIXED), sum(OUTS))
    expected = y + by_row(MIXED, x, 2.0)
    low = tuple(torch.zeros(len(MIXED), RANK) for _ in OUTS)
    kernels.add_shrink(wrapper(MIXED), low, x, a, 2.0)
    kernels.add_expand(wrapper(MIXED), y, low, b, OUTS)
    torch.testing.assert_close(y, expected)


def test_expand_may_replace_instead_of_add() -> None:
    a, b = weights()
    x = torch.randn(len(MIXED), WIDTH)
    y = torch.ones(len(MIXED), sum(OUTS))
    low = tuple(torch.zeros(len(MIXED), RANK) for _ in OUTS)
    kernels.add_shrink(wrapper(MIXED), low, x, a, 1.0)
    kernels.add_expand(wrapper(MIXED), y, low, b, OUTS, add_inputs=False)
    expected = by_row(MIXED, x, 1.0)
    expected[[0, 4]] = 1.0  # the base model's rows keep what they had
    torch.testing.assert_close(y, expected)


def test_embeddings_and_logits() -> None:
    a, b = weights()
    x, y = torch.randn(len(MIXED), WIDTH), torch.zeros(len(MIXED), OUTS[0])
    expected = by_row(MIXED, x, 1.5)[:, : OUTS[0]]
    kernels.add_lora_logits(wrapper(MIXED), y, x, a[0], b[0], 1.5)
    torch.testing.assert_close(y, expected)
    low, z = torch.zeros(len(MIXED), RANK), torch.zeros(len(MIXED), OUTS[0])
    kernels.add_shrink(wrapper(MIXED), (low,), x, a[:1], 1.5)
    kernels.add_lora_embedding(wrapper(MIXED), z, low, b[0])
    torch.testing.assert_close(z, expected)


def test_rows_side_by_side_are_a_range() -> None:
    assert kernels.group(torch.tensor([-1, 1, 1, 0])) == [(0, slice(3, 4)), (1, slice(1, 3))]
