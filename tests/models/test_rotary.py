"""Rotary positions by table: what the model's own module gives, which is asked seldom."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from midstream.models.rotary import RotaryTable, tabled

CPU = torch.device("cpu")


def module(kind: str = "default", **parameters: float) -> LlamaRotaryEmbedding:
    rope = {"rope_type": kind, "rope_theta": 1e4, **parameters}
    return LlamaRotaryEmbedding(LlamaConfig(hidden_size=64, num_attention_heads=2, rope_parameters=rope))


class Counted:
    def __init__(self, rotary: nn.Module) -> None:
        self.rotary, self.calls = rotary, 0

    def __call__(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        found: tuple[Tensor, Tensor] = self.rotary(x, positions)
        return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("positions", [[0], [7, 3, 3], [1023], [1024], [5000, 2]])
def test_a_table_gives_what_the_module_gives(dtype: torch.dtype, positions: list[int]) -> None:
    own = module("linear", factor=2.0)
    x, at = torch.empty(1, 1, 64, dtype=dtype), torch.tensor([positions])
    for found, expected in zip(RotaryTable(own)(x, at), own(x, at), strict=True):
        assert found.dtype == dtype
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 if dtype == torch.float32 else 0)


def test_the_module_is_asked_again_only_where_the_table_ends_or_the_type_changes() -> None:
    counted = Counted(module())
    table, x = RotaryTable(counted), torch.empty(1, 1, 64)
    for position in (3, 900, 1023):
        table(x, torch.tensor([[position]]))
    assert counted.calls == 1
    table(x, torch.tensor([[1024]]))
    table(x, torch.tensor([[2047]]))
    assert counted.calls == 2
    table(x.bfloat16(), torch.tensor([[5]]))
    assert counted.calls == 3


def test_a_module_whose_frequencies_follow_the_length_is_left_alone() -> None:
    assert isinstance(tabled(module(), CPU), RotaryTable)
    dynamic = module("dynamic", factor=2.0)
    assert tabled(dynamic, CPU) is dynamic
    assert tabled(module(), torch.device("cuda")).__class__ is LlamaRotaryEmbedding
    unknown = nn.Identity()
    assert tabled(unknown, CPU) is unknown
