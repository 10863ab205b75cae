"""Layers put in the place of a model's own: they give its numbers, and nothing of the old ones stays."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn
from transformers.models.llama import modeling_llama

from midstream.config import EngineConfig
from midstream.engine.engine import AsyncEngine
from midstream.models.layer import FusedLayer
from midstream.models.linear import AdapterLinear
from midstream.models.load import LoadedModel, prepare
from midstream.models.stack import FusedStack
from midstream.types import Request
from tests.helpers import tiny_model
from tests.models.native import KERNELS, decoder_layers, kernels_named, needs_compiler
from tests.models.served import check
from tests.models.test_architectures import COMMON, MOE
from tests.reference import logits
from tests.tiny import tiny_chat

# Heads of a size that the compiled kernels serve; a width that their vectors do not divide.
LARGER: dict[str, Any] = {**COMMON, "hidden_size": 64, "intermediate_size": 72, "head_dim": 32}
FUSED: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (tf.LlamaConfig, {}),
    "llama with heads of 64": (tf.LlamaConfig, {"head_dim": 64, "num_attention_heads": 8}),
    "llama with biases": (tf.LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "mistral with a window": (tf.MistralConfig, {"sliding_window": 24}),
    "qwen2": (tf.Qwen2Config, {}),
    "qwen2 with windows in some layers": (
        tf.Qwen2Config,
        {
            "use_sliding_window": True,
            "sliding_window": 20,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
    ),
    "granite": (
        tf.GraniteConfig,
        {
            "hidden_size": 128,
            "attention_multiplier": 0.1,
            "residual_multiplier": 0.4,
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
        },
    ),
}
KEPT: dict[str, tuple[Any, dict[str, Any]]] = {
    "qwen3": (tf.Qwen3Config, {}),
    "smollm3": (tf.SmolLM3Config, {"no_rope_layers": [1, 0, 1]}),
    "olmo2": (tf.Olmo2Config, {"hidden_size": 128}),
    "gemma3": (
        tf.Gemma3TextConfig,
        {
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "query_pre_attn_scalar": 8,
        },
    ),
    "phi3": (tf.Phi3Config, {"sliding_window": 20, "hidden_size": 128}),
    "qwen3_moe": (tf.Qwen3MoeConfig, {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
    "granitemoe": (tf.GraniteMoeConfig, {**MOE, "hidden_size": 128}),
}


def network(config: Any, more: dict[str, Any]) -> Any:
    fields = {**LARGER, **more}
    if config in (tf.GraniteConfig, tf.GraniteMoeConfig, tf.Olmo2Config):
        del fields["head_dim"]
    model = tiny_model(config(**fields))
    # transformers starts biases at zero and norms at one.
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias") or "norm" in name:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def made(model: Any, kernels: str | None = None) -> LoadedModel:
    """A copy of the model, prepared with the named kernels or, with None, those that the engine picks."""
    named = None if kernels is None else kernels_named(kernels, model.dtype)
    return prepare(copy.deepcopy(model), tiny_chat(), name="tiny", kernels=named)


def fused(loaded: LoadedModel) -> list[bool]:
    """By layer: whether it is a fused one."""
    return [isinstance(layer, FusedLayer) for layer in decoder_layers(loaded)]


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", FUSED)
async def test_layers_of_the_common_kind_are_fused_and_equal_to_transformers(name: str, kernels: str) -> None:
    model = network(*FUSED[name])
    for step_tokens in (11, 512):
        loaded = made(model, kernels)
        assert fused(loaded) == [True] * 3
        assert loaded.extents == (kernels != "torch")
        assert isinstance(loaded.model.model.layers[0], FusedStack) == (kernels == "stack")
        await check(model, loaded, step_tokens)


@needs_compiler
@pytest.mark.parametrize("name", KEPT)
async def test_other_layers_stay_and_are_equal_to_transformers(name: str) -> None:
    model = network(*KEPT[name])
    loaded = made(model, "stack")
    assert fused(loaded) == [False] * 3
    assert loaded.extents
    assert [type(layer) for layer in loaded.model.model.layers] == [type(layer) for layer in model.model.layers]
    await check(model, loaded)


@pytest.mark.parametrize("name", ["llama with biases", "qwen2", "granite"])
def test_adapters_find_the_same_linear_layers(name: str) -> None:
    model = network(*FUSED[name])
    own = {path: (m.out_features, m.in_features) for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    del own["lm_head"]
    assert made(model).linear_shapes == own


# ---------------------------------------------------------------------- layers that only look like the common ones


class Halved(modeling_llama.LlamaDecoderLayer):
    """Everything is there, and what it computes is another thing."""

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return super().forward(hidden_states, **kwargs) * 0.5


class WithOneMore(modeling_llama.LlamaDecoderLayer):
    """A parameter that the common ones do not have, and that does nothing for a short text."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.gate = nn.Parameter(torch.zeros(()))


class UnlikeAttention(modeling_llama.LlamaAttention):
    """The queries are scaled down."""

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        return super().forward(hidden_states * 0.7, **kwargs)


def llama_with(layer: type[nn.Module] | None = None, attention: type[nn.Module] | None = None) -> Any:
    """A tiny Llama whose middle layer, or the attention of it, is of another class of the same name."""
    model = network(*FUSED["llama"])
    config, old = model.config, model.model.layers[1]
    if layer is not None:
        layer.__name__ = "LlamaDecoderLayer"
        new = layer(config, 1)
        new.load_state_dict(old.state_dict(), strict=False)
        model.model.layers[1] = new.eval()
    if attention is not None:
        new = attention(config, 1)
        new.load_state_dict(old.self_attn.state_dict())
        old.self_attn = new.eval()
    return model


@pytest.mark.parametrize(
    "change",
    [{"layer": Halved}, {"layer": WithOneMore}, {"attention": UnlikeAttention}],
    ids=["layer", "parameter", "attention"],
)
async def test_a_layer_that_is_only_named_like_a_known_one_is_left_alone(change: dict[str, Any]) -> None:
    model = llama_with(**change)
    loaded = made(model)
    assert fused(loaded) == [True, False, True]
    assert type(loaded.model.model.layers[1]) is type(model.model.layers[1])
    await check(model, loaded)


async def test_layers_with_another_activation_are_left_alone() -> None:
    model = network(tf.LlamaConfig, {"hidden_act": "gelu"})
    loaded = made(model)
    assert fused(loaded) == [False] * 3
    await check(model, loaded)


# ---------------------------------------------------------------------- memory and types


def old_parts(model: Any) -> list[weakref.ref[Any]]:
    """The layers, the linear layers in them, and their weights."""
    products = [m for layer in model.model.layers for m in layer.modules() if isinstance(m, nn.Linear)]
    assert len(products) == 7 * 3
    return [weakref.ref(part) for part in (*model.model.layers, *products, *(product.weight for product in products))]


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs a torch that is built with oneDNN")
def test_nothing_of_the_old_layers_stays() -> None:
    model = network(*FUSED["qwen2"])
    old = old_parts(model)
    loaded = prepare(model, tiny_chat(), name="tiny")
    gc.collect()
    assert fused(loaded) == [True] * 3
    assert [part() for part in old] == [None] * len(old)
    assert sum(isinstance(m, AdapterLinear) for m in loaded.model.model.modules()) == 4 * 3


def test_no_two_copies_of_all_layers_are_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(*FUSED["llama"])
    layers = [weakref.ref(layer) for layer in model.model.layers]
    alive = []

    class Noted(FusedLayer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            alive.append(sum(layer() is not None for layer in layers))
            super().__init__(*args, **kwargs)

    monkeypatch.setattr("midstream.models.fuse.FusedLayer", Noted)
    prepare(model, tiny_chat(), name="tiny")
    assert alive == [3, 2, 1]


@needs_compiler
@pytest.mark.parametrize("name", ["llama", "granite"])
async def test_bfloat16_follows_float32(name: str) -> None:
    model = network(*FUSED[name])
    loaded = made(model.to(torch.bfloat16))
    assert fused(loaded) == [True] * 3
    assert loaded.extents
    prompt = tuple(range(10, 60))
    engine = AsyncEngine(loaded, EngineConfig(kv_budget_bytes=4 * 1024**2))
    try:
        await engine.warm(prompt[:49])
        score = await engine.score(Request(prompt=prompt), [[t] for t in range(0, 300, 30)])
        expected = logits(model.float(), prompt)[-1].log_softmax(-1)
        for row, token in zip(score.logprobs, range(0, 300, 30), strict=True):
            assert abs(row[0] - float(expected[token])) < 0.3
    finally:
        await engine.aclose()
