"""Architectures of transformers, unchanged, on small random configurations: equal to transformers' own attention."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as tf

from midstream.errors import ModelError
from midstream.models.attention import attend_by_definition
from midstream.models.load import prepare
from midstream.types import Request
from tests.helpers import tiny_model
from tests.models.served import check
from tests.reference import logits
from tests.tiny import tiny_chat, tiny_engine

COMMON: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
SERVED: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (tf.LlamaConfig, {}),
    "mistral with a window": (tf.MistralConfig, {"sliding_window": 24}),
    "qwen2": (tf.Qwen2Config, {}),
    "qwen3": (tf.Qwen3Config, {}),
    "granite": (
        tf.GraniteConfig,
        {"attention_multiplier": 0.2, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    ),
    "smollm3": (tf.SmolLM3Config, {"no_rope_layers": [1, 0, 1]}),
    "olmo2": (tf.Olmo2Config, {}),
    "gemma3 with windows": (
        tf.Gemma3TextConfig,
        {
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "query_pre_attn_scalar": 8,
        },
    ),
    "phi3 with a window": (tf.Phi3Config, {"sliding_window": 20}),
    "qwen3_moe": (
        tf.Qwen3MoeConfig,
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    "granitemoe": (tf.GraniteMoeConfig, MOE),
    "gpt_neox": (tf.GPTNeoXConfig, {}),
}


def network(name: str) -> Any:
    config, more = SERVED[name]
    fields = {**COMMON, **more}
    if name in ("granite", "granitemoe", "olmo2"):
        del fields["head_dim"]
    return tiny_model(config(**fields))


@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize("step_tokens", [11, 512])
async def test_equal_to_transformers_through_prefill_reuse_branches_and_decode(name: str, step_tokens: int) -> None:
    model = network(name)
    await check(model, prepare(copy.deepcopy(model), tiny_chat(), name=name), step_tokens)


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "mamba": (tf.MambaConfig, {}, "state that is not per-token"),
    "qwen3_next hybrid": (tf.Qwen3NextConfig, {"num_experts": 4}, "linear_attention"),
    "gemma2 softcapping": (tf.Gemma2Config, {}, "attn_logit_softcapping"),
    "bloom alibi": (tf.BloomConfig, {}, "do not use the shared attention"),
    "gpt_oss sinks": (tf.GptOssConfig, {**MOE, "sliding_window": 8}, "s_aux"),
    "deepseek latent attention": (tf.DeepseekV3Config, {}, "kv_lora_rank"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_served_is_refused_with_the_reason(name: str) -> None:
    config, more, reason = REFUSED[name]
    with pytest.raises(ModelError, match=reason):
        prepare(tiny_model(config(**{**COMMON, **more})), tiny_chat(), name=name)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
async def test_half_precision_follows_float32(dtype: str) -> None:
    model = network("llama").to(getattr(torch, dtype))
    prompt = tuple(range(10, 60))
    engine = tiny_engine(model)
    try:
        await engine.warm(prompt[:30])
        score = await engine.score(Request(prompt=prompt), [[t] for t in range(0, 300, 30)])
        expected = logits(model.float(), prompt)[-1].log_softmax(-1)
        assert (
            max(abs(row[0] - float(expected[t])) for row, t in zip(score.logprobs, range(0, 300, 30), strict=True))
            < 0.3
        )
    finally:
        await engine.aclose()


@pytest.mark.parametrize("causal", [True, False])
def test_the_definition_equals_the_kernel(causal: bool) -> None:
    q, k, v = (torch.randn(1, 3, 9, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    mask = None if causal else torch.zeros(9, 9).masked_fill(torch.rand(9, 9) > 0.8, float("-inf"))
    if mask is not None:
        mask[:, 0] = 0.0
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, is_causal=causal, attn_mask=mask, scale=0.3
    )
    out, lse = attend_by_definition(q, k, v, mask, causal, 0.3)
    torch.testing.assert_close(out, kernel[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, kernel[1], atol=1e-5, rtol=1e-5)
