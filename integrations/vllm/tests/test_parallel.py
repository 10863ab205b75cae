"""Tensor parallelism: two processes with half of each layer, and half of each adapter's factors."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest
from tests.helpers import SEVEN, make_adapter_folder, tiny_llama
from tests.reference import peft_model

from conftest import judged
from serving import Vllm

INVOCATION = [7, 3, 5]
TOKENS = 8
BLOCK = 32
# Heads of a size that vLLM's attention on the CPU has, and an even number of them.
SIZES = {"hidden": 128, "heads": 4, "kv_heads": 2}
OPTIONS = {
    "dtype": "float32",
    "enable_lora": True,
    "max_loras": 2,
    "max_lora_rank": 16,
    "block_size": BLOCK,
    "max_model_len": 512,
    "max_num_batched_tokens": 72,
    "num_gpu_blocks_override": 64,
    "skip_tokenizer_init": True,
    "tensor_parallel_size": 2,
}


def asked(folders: dict[str, Path], count: int) -> list[dict[str, Any]]:
    """Base, LoRA and aLoRA on each of some texts, the aLoRA behind its invocation."""
    drawn = random.Random(0)
    found: list[dict[str, Any]] = []
    for number in range(count):
        text = [drawn.randrange(10, 250) for _ in range(40 + 30 * number)]
        for name, folder in (None, None), *folders.items():
            prompt = text + INVOCATION + [9, 9] if name == "alora" else text
            adapter = None if folder is None else [name, 1 + list(folders).index(str(name)), str(folder)]
            params = {"max_tokens": TOKENS, "detokenize": False}
            found.append({"adapter": adapter, "prompt": prompt, "params": params})
    return found


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two processes of vLLM want two cores")
def test_two_ranks_answer_as_peft_does_and_reuse_the_base_models_blocks(vllm: Vllm, tmp_path: Path) -> None:
    model = tiny_llama(**SIZES)
    model.save_pretrained(tmp_path / "model")
    invocations = {"alora": INVOCATION, "lora": None}
    folders = {
        name: make_adapter_folder(
            model, tmp_path / name, targets=SEVEN, rank=8, invocation=invocation, seed=seed, scale=0.3
        )
        for seed, (name, invocation) in enumerate(invocations.items())
    }
    peft = peft_model(model, folders)
    calls = asked(folders, 4)
    with vllm.offline(model=str(tmp_path / "model"), **OPTIONS) as engine:
        together = engine.ask("generate", calls=calls)
        engine.ask("clear")
        base, alora = calls[-3:-1]
        engine.ask("generate", calls=[base])
        (again,) = engine.ask("generate", calls=[alora])
    for call, found in zip(calls, together, strict=True):
        (answer,) = found["tokens"]
        likeliest, logprobs = judged(peft, call["prompt"], answer, call["adapter"] and call["adapter"][0])
        assert answer == likeliest, call["adapter"]
        assert found["logprobs"][0] == pytest.approx(logprobs, abs=1e-3)
    # So that what is the adapter's cannot be the base model's.
    (answer,) = again["tokens"]
    assert judged(peft, alora["prompt"], answer, None)[1] != pytest.approx(again["logprobs"][0], abs=1e-2)
    assert again["tokens"] == together[-2]["tokens"]
    assert again["cached"] == len(base["prompt"]) // BLOCK * BLOCK
