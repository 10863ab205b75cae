"""A Granite of random weights, and adapters for it, made where they are used: no file is loaded from anywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, GraniteConfig

INVOCATION = tuple(range(100, 108))
RANK = 32
TARGETS = ("q_proj", "k_proj", "v_proj")

# Granite 3.3 8B's shape and factors; and one of the same kind that a CPU computes in a moment.
_FACTORS: dict[str, Any] = {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 16.0}
SHAPES: dict[str, dict[str, Any]] = {
    "8b": {
        "vocab_size": 49159,
        "hidden_size": 4096,
        "intermediate_size": 12800,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "attention_multiplier": 0.0078125,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 320,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attention_multiplier": 0.03125,
        "initializer_range": 0.2,
        "tie_word_embeddings": True,
    },
}


def random_granite(shape: str, dtype: torch.dtype, device: torch.device) -> Any:
    """The same weights each time on one kind of device. PEFT's side gets torch's fast attention with it."""
    config = GraniteConfig(
        **SHAPES[shape],
        **_FACTORS,
        max_position_embeddings=131_072,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000_000.0},
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()


def write_adapter(model: nn.Module, folder: Path, *, seed: int, alora: bool) -> Path:
    """A PEFT folder of random factors of the query, key and value layers."""
    config = LoraConfig(
        r=RANK,
        lora_alpha=RANK,
        target_modules=list(TARGETS),
        task_type="CAUSAL_LM",
        alora_invocation_tokens=list(INVOCATION) if alora else None,
    )
    config.save_pretrained(str(folder))
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for path, layer in model.named_modules():
        if path.endswith(TARGETS) and isinstance(layer, nn.Linear):
            a = torch.randn(RANK, layer.in_features, generator=generator) * layer.in_features**-0.5
            b = torch.randn(layer.out_features, RANK, generator=generator) * RANK**-0.5
            tensors[f"base_model.model.{path}.lora_A.weight"] = a
            tensors[f"base_model.model.{path}.lora_B.weight"] = b
    save_file(tensors, folder / "adapter_model.safetensors")
    written = json.loads((folder / "adapter_config.json").read_text())
    assert bool(written["alora_invocation_tokens"]) == alora
    return folder
