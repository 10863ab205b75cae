"""A decoder layer of the common kind, with its products joined and nothing computed in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from midstream.models.attention import attend
from midstream.models.deltas import DeltaContext
from midstream.models.kernels import Kernels, add_scaled
from midstream.models.linear import AdapterLinear
from midstream.models.pool import AttentionShape, ForwardPlan
from midstream.models.products import Product, WeightKind


class FusedLayer(nn.Module):
    """Norm, attention with rotary positions, norm, gated perceptron; each with its residual."""

    def __init__(
        self,
        layer: Any,
        path: str,
        index: int,
        shape: AttentionShape,
        context: DeltaContext,
        kernels: Kernels,
        kind: WeightKind | None = None,
    ) -> None:
        super().__init__()
        attention, perceptron = layer.self_attn, layer.mlp

        def product(parent: Any, name: str, *children: str) -> AdapterLinear:
            layers = {f"{path}.{name}.{child}": getattr(parent, child) for child in children}
            return AdapterLinear(layers, context, kernels, kind)

        self.qkv = product(attention, "self_attn", "q_proj", "k_proj", "v_proj")
        self.o = product(attention, "self_attn", "o_proj")
        self.gate_up = product(perceptron, "mlp", "gate_proj", "up_proj")
        self.down = product(perceptron, "mlp", "down_proj")
        self.linears = (self.qkv, self.o, self.gate_up, self.down)
        self.first_norm, self.second_norm = layer.input_layernorm, layer.post_attention_layernorm
        self.residual_scale = float(getattr(layer, "residual_multiplier", 1.0))
        self.kernels = kernels
        self.index = index
        self.shape = shape
        if hasattr(layer, "attention_type"):
            self.attention_type = layer.attention_type

    def use(self, kernels: Kernels, products: Sequence[Product]) -> None:
        """Go on with other kernels, and the same products, of `linears` in turn, as they compute them."""
        self.kernels = kernels
        for linear, product in zip(self.linears, products, strict=True):
            linear.use(kernels, product)

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
        x, kernels, scale = hidden_states[0], self.kernels, self.residual_scale
        normed = kernels.norm(x, self.first_norm.weight, self.first_norm.eps)
        update = self.o(self._attended(self.qkv(normed), position_embeddings, midstream_plan))
        normed = kernels.add_norm(x, update, scale, self.second_norm.weight, self.second_norm.eps)
        add_scaled(x, self.down(kernels.gated(self.gate_up(normed))), scale)
        return hidden_states

    def _attended(self, qkv: Tensor, position_embeddings: tuple[Tensor, Tensor], plan: ForwardPlan) -> Tensor:
        cosine, sine = position_embeddings[0][0], position_embeddings[1][0]
        kv = plan.pool.layers[self.index]
        query = self.kernels.rotate(qkv, cosine, sine, kv, plan.attention.write_slots)
        shape = self.shape
        out = attend(query, kv, plan.attention, self.kernels, shape.scale, shape.window)
        return out.reshape(out.shape[0], -1)


_KNOWN = frozenset({"LlamaDecoderLayer", "MistralDecoderLayer", "GraniteDecoderLayer", "Qwen2DecoderLayer"})
_PARAMETERS = frozenset(
    {
        *(f"self_attn.{name}_proj.{kind}" for name in "qkvo" for kind in ("weight", "bias")),
        *(f"mlp.{name}_proj.{kind}" for name in ("gate", "up", "down") for kind in ("weight", "bias")),
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
    }
)


def is_common(layer: nn.Module) -> bool:
    """Whether a layer is of the kind that FusedLayer computes.

    By name, for what a layer does far from the start of a text cannot be seen in a trial; and by its parameters.
    """
    names = {name for name, _ in layer.named_parameters()}
    whole = names >= {name for name in _PARAMETERS if name.endswith("weight")}
    activation = getattr(getattr(layer, "mlp", None), "act_fn", None)
    silu = type(activation).__name__ in ("SiLU", "SiLUActivation")
    return type(layer).__name__ in _KNOWN and whole and names <= _PARAMETERS and silu
