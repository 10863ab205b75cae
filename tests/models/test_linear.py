"""The base layer's product: the same for any number of rows, with few kinds of kernel."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from midstream.models.deltas import DeltaContext
from midstream.models.linear import AdapterLinear, padded_rows


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs a torch that is built with oneDNN")
@pytest.mark.parametrize("rows", [1, 2, 16, 17, 24, 31, 127, 128, 129, 300])
@pytest.mark.parametrize("bias", [False, True])
@torch.inference_mode()
def test_packed_products_are_the_layers_own(rows: int, bias: bool) -> None:
    torch.manual_seed(rows)
    base = nn.Linear(24, 40, bias=bias)
    x = torch.randn(1, rows, 24)
    expected = base(x)
    found = AdapterLinear({"layer": base}, DeltaContext(), pack=True)(x)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected)


def test_all_steps_of_512_rows_need_few_kinds_of_products() -> None:
    kinds = {padded_rows(rows) for rows in range(1, 513)}
    assert len(kinds) == 68
    assert all(rows <= padded_rows(rows) < rows + 16 for rows in range(1, 513))
