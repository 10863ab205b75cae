"""Eight-bit KV: the logits are those of transformers' attention over keys and values that were rounded alike."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from pydantic import ValidationError
from torch import Tensor
from transformers.masking_utils import eager_mask
from transformers.models.llama.modeling_llama import eager_attention_forward

from midstream.config import EngineConfig
from midstream.engine.engine import AsyncEngine
from midstream.errors import ModelError, PromptTooLong
from midstream.models.kernels import Kernels
from midstream.models.load import prepare
from midstream.types import Completion, Request, SamplingParams
from tests.engine.test_native_parity import SIX, fused_engine, request_of
from tests.engine.test_parity import TEXT
from tests.helpers import make_adapter_folder
from tests.models.native import KERNELS, PackedKernels, kernels_named
from tests.models.served import check
from tests.models.test_fused_layers import FUSED, KEPT, network
from tests.reference import logits, peft_model
from tests.tiny import tiny_chat

# Where float32's error makes a number 0.5 plus or minus a little, it goes to the next whole number in one and not in
# the other; then logits are off by up to 6e-3 here, and by 1e-5 where that happens to none.
WITHIN = 2e-2
NETWORKS = {
    **{name: FUSED[name] for name in ("llama", "mistral with a window", "granite", "llama with heads of 64")},
    # Heads of a size that the compiled kernels do not serve, and layers that stay transformers' own.
    "llama with heads of 16": (tf.LlamaConfig, {"head_dim": 16}),
    "qwen3": KEPT["qwen3"],
    "smollm3": KEPT["smollm3"],
}


def in_eight_bits(x: Tensor) -> Tensor:
    """Each vector's numbers as 127ths of its largest."""
    unit = x.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    return (x / unit).round() * unit


def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
    return eager_attention_forward(module, query, in_eight_bits(key), in_eight_bits(value), mask, **kwargs)


tf.AttentionInterface.register("eight_bits", attention)
tf.AttentionMaskInterface.register("eight_bits", eager_mask)


def rounding(model: Any) -> Any:
    """A copy that rounds all keys and values that its attention sees."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("eight_bits")
    return model


@pytest.fixture(params=KERNELS)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return kernels_named(request.param)


@pytest.mark.parametrize("name", NETWORKS)
async def test_logits_are_those_of_rounded_keys_and_values(name: str, kernels: Kernels) -> None:
    """Prefill at once and in small steps, reuse, branches, decode."""
    model = network(*NETWORKS[name])
    reference = rounding(model)
    # The rounding shows: a test that passed without it would say nothing.
    assert float((logits(reference, TEXT) - logits(model, TEXT)).abs().max()) > 5 * WITHIN
    for step_tokens in (11, 512):
        loaded = prepare(copy.deepcopy(model), tiny_chat(), name="tiny", kernels=kernels)
        await check(reference, loaded, step_tokens, within=WITHIN, kv_dtype="int8")


async def test_adapters_and_the_base_share_rounded_keys_and_values(kernels: Kernels, tmp_path: Path) -> None:
    model = network(*FUSED["llama with biases"])
    folders = {name: make_adapter_folder(model, tmp_path / name, **spec) for name, spec in SIX.items()}
    reference = peft_model(rounding(model), folders)
    engine = fused_engine(model, kernels, kv_dtype="int8", max_step_tokens=64)
    try:
        for name, folder in folders.items():
            await engine.load_adapter(folder, name=name)
        await engine.warm(TEXT)
        requests = [request_of(name) for name in (None, *SIX, None)]
        for _ in range(2):
            answers = await asyncio.gather(*(engine.complete(request) for request in requests))
            for request, answer in zip(requests, answers, strict=True):
                assert_follows(request, answer, reference)
                alone = request.adapter is not None and "invocation" not in SIX[request.adapter]
                assert alone or answer.usage.cached_tokens >= len(TEXT) - 1
        await engine.check_integrity()
    finally:
        await engine.aclose()


def assert_follows(request: Request, answer: Completion, reference: Any) -> None:
    table = logits(reference, [*request.prompt, *answer.token_ids], request.adapter).log_softmax(-1)
    assert answer.choices[0].logprobs is not None
    for row, found in enumerate(answer.choices[0].logprobs, start=len(request.prompt) - 1):
        assert float(table[row].max() - table[row, found.token_id]) < WITHIN
        assert all(abs(float(table[row, other.token_id]) - other.logprob) < WITHIN for other in found.top)


@pytest.mark.parametrize("step_tokens", [33, 50, 512])
async def test_chunks_of_any_size_give_the_same_numbers(step_tokens: int, kernels: Kernels) -> None:
    """Bit by bit where the products are our own and no chunk is of a few rows."""
    model = network(*FUSED["llama"])
    prompt = tuple((17 * i + 3) % 310 + 4 for i in range(100))  # of which the last is read with the answer
    found = []
    for most in (step_tokens, 99):
        engine = fused_engine(model, kernels, kv_dtype="int8", max_step_tokens=most, prefill_step_s=1e6)
        try:
            answer = await engine.complete(request_of(None, prompt))
            assert answer.choices[0].logprobs is not None
            found.append(torch.tensor([other.logprob for each in answer.choices[0].logprobs for other in each.top]))
        finally:
            await engine.aclose()
    if isinstance(kernels, PackedKernels):
        assert torch.equal(*found)
    assert float((found[0] - found[1]).abs().max()) < WITHIN


@pytest.mark.parametrize("kind", KERNELS)
async def test_bfloat16_follows_the_rounded_keys_and_values(kind: str) -> None:
    model = network(*FUSED["llama"]).to(torch.bfloat16)
    engine = fused_engine(model, kernels_named(kind, torch.bfloat16), kv_dtype="int8")
    try:
        await engine.warm(TEXT)
        prompt = (*TEXT, 7)
        score = await engine.score(Request(prompt=prompt), [[t] for t in range(0, 300, 30)])
        expected = logits(rounding(model.float()), prompt)[-1].log_softmax(-1)
        for row, token in zip(score.logprobs, range(0, 300, 30), strict=True):
            assert abs(row[0] - float(expected[token])) < 0.3
    finally:
        await engine.aclose()


# ---------------------------------------------------------------------- what the setting means


@pytest.mark.parametrize("name", KERNELS)
async def test_the_same_budget_holds_more_tokens(name: str) -> None:
    """Heads of 64 in bfloat16: 68 bytes for 128."""
    model = network(*FUSED["llama with heads of 64"]).to(torch.bfloat16)
    kernels = kernels_named(name, torch.bfloat16)
    budget = 3 * 2 * 2 * 128 * 100  # of all layers: 100 tokens
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    prompt = tuple(range(4, 180))
    engines = [fused_engine(model, kernels, kv_dtype=kind, kv_budget_bytes=budget) for kind in (None, "int8")]
    try:
        assert [engine.max_context_tokens for engine in engines] == [100, 188]
        with pytest.raises(PromptTooLong):
            await engines[0].complete(Request(prompt=prompt, params=params))
        answer = await engines[1].complete(Request(prompt=prompt, params=params))
        assert len(answer.token_ids) == 4
        stats = await engines[1].stats()
        assert budget - 3 * 2 * 2 * 68 < stats.kv_total_bytes <= budget
    finally:
        for engine in engines:
            await engine.aclose()


def test_other_devices_and_kinds_are_refused() -> None:
    loaded = prepare(network(*FUSED["llama"]), tiny_chat(), name="tiny")
    elsewhere = dataclasses.replace(loaded, device=torch.device("cuda"))
    with pytest.raises(ModelError, match="kv_dtype int8 is not implemented on cuda"):
        AsyncEngine(elsewhere, EngineConfig(kv_dtype="int8"))
    with pytest.raises(ValidationError, match="int8"):
        EngineConfig.model_validate({"kv_dtype": "int4"})
