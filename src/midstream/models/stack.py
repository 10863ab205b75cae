"""A model's fused layers as one module: in one call where the kernels have it, else one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from midstream.models.kernels import StackRun
from midstream.models.layer import FusedLayer
from midstream.models.pool import ForwardPlan


class FusedStack(nn.Module):
    """Stands in a model's list of layers in the place of all of them."""

    def __init__(self, layers: Sequence[FusedLayer], run: StackRun) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self._each = tuple(layers)
        self._run = run
        self._context = layers[0].qkv.context
        if hasattr(layers[0], "attention_type"):
            self.attention_type = layers[0].attention_type

    def forward(
        self,
        hidden_states: Tensor,
        *_: Any,
        position_embeddings: tuple[Tensor, Tensor],
        midstream_plan: ForwardPlan | None = None,
        **__: Any,
    ) -> Tensor:
        """hidden_states [1, rows, features], which is changed in place, → the same.

        Raises RuntimeError when the model calls it without a plan.
        """
        if midstream_plan is None:
            raise RuntimeError("the model does not pass the engine's plan through to its layers")
        positions = position_embeddings[0][0], position_embeddings[1][0]
        if not self._run(hidden_states[0], positions, midstream_plan, self._context):
            for layer in self._each:
                layer(hidden_states, position_embeddings=position_embeddings, midstream_plan=midstream_plan)
        return hidden_states
