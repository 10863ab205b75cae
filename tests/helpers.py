"""Tiny random models and PEFT adapters."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def tiny_config(vocab: int = 320, layers: int = 2, hidden: int = 32, heads: int = 4, kv_heads: int = 2) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=2048,
        # Large weights, so that a token's history shows in its logits and greedy answers are not all alike.
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=258,
    )


def tiny_model(config: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def tiny_llama(seed: int = 0, **sizes: int) -> LlamaForCausalLM:
    return tiny_model(tiny_config(**sizes), seed)


def make_adapter_folder(
    model: Any,
    folder: Path,
    *,
    rank: int = 4,
    alpha: int = 8,
    targets: Sequence[str] | str = ("q_proj", "k_proj", "v_proj"),
    invocation: Sequence[int] | None = None,
    seed: int = 0,
    rank_pattern: dict[str, int] | None = None,
    alpha_pattern: dict[str, int] | None = None,
    use_rslora: bool = False,
    scale: float = 1.0,
    **more: Any,
) -> Path:
    """A random adapter (B is not zero, times `scale`) written by PEFT itself; `model` stays as it is."""
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=targets if isinstance(targets, str) else list(targets),
        rank_pattern=rank_pattern or {},
        alpha_pattern=alpha_pattern or {},
        use_rslora=use_rslora,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
        alora_invocation_tokens=None if invocation is None else list(invocation),
        **more,
    )
    torch.manual_seed(seed)
    adapted = get_peft_model(copy.deepcopy(model), config)
    for name, weight in adapted.named_parameters():
        if ".lora_B." in name:
            weight.data *= scale
    adapted.save_pretrained(str(folder))
    return folder
