from __future__ import annotations

import torch
import transformers as tf
from torch import nn

from midstream.models.fusions import FusedRMSNorm, fuse_norms
from tests.helpers import tiny_llama, tiny_model
from tests.models.test_architectures import COMMON


class StrangeRMSNorm(nn.Module):
    """Named like one, but subtracts the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.eps = 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * nn.functional.layer_norm(x, (8,))


def test_norms_are_swapped_only_where_the_numbers_stay() -> None:
    assert fuse_norms(nn.Sequential(StrangeRMSNorm())) == 0
    # Gemma adds one to the weight.
    assert fuse_norms(tiny_model(tf.Gemma3TextConfig(**COMMON))) == 0
    model = tiny_llama()
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        before = model(input_ids=ids).logits
        assert fuse_norms(model) == 5
        torch.testing.assert_close(model(input_ids=ids).logits, before, atol=1e-4, rtol=1e-4)
    assert any(isinstance(module, FusedRMSNorm) for module in model.modules())
