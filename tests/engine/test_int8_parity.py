"""Eight-bit weights: the logits are those of the model whose linear layers have the rounded weights; adapters too."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

from midstream.models.kernels import Kernels
from midstream.models.load import prepare
from midstream.models.native.products import PackedProduct
from midstream.models.products import Int8Product, quantized
from midstream.types import Request, SamplingParams
from tests.engine.test_native_parity import assert_equal, fused_engine
from tests.engine.test_parity import EIGHT, TEXT, placements
from tests.helpers import SEVEN, make_adapter_folder
from tests.models.native import KERNELS, decoder_layers, kernels_named
from tests.models.served import check
from tests.models.test_fused_layers import FUSED, KEPT, network
from tests.reference import logits, peft_model
from tests.tiny import tiny_chat

ADAPTERS: dict[str, dict[str, Any]] = {
    "alora": {"targets": SEVEN, "invocation": EIGHT},
    "lora": {"targets": SEVEN, "rank": 3},
}
NETWORKS = {
    "llama with biases": FUSED["llama with biases"],
    "granite": FUSED["granite"],
    "qwen2 whose head is its embedding": (tf.Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": KEPT["qwen3"],
}


@pytest.fixture(params=KERNELS)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return kernels_named(request.param)


def rounded(model: Any) -> Any:
    """A copy whose linear layers have what eight bits keep of their weights; an embedding keeps its own."""
    model = copy.deepcopy(model)
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            numbers, scales = quantized(layer.weight)
            layer.weight = nn.Parameter(numbers.float() * scales[:, None], requires_grad=False)
    return model


@pytest.mark.parametrize("name", NETWORKS)
async def test_logits_are_those_of_the_rounded_weights(name: str, kernels: Kernels) -> None:
    model = network(*NETWORKS[name])
    reference = rounded(model)
    # The rounding shows: a test that passed with the weights as they were would say nothing.
    assert float((logits(reference, TEXT) - logits(model, TEXT)).abs().max()) > 0.05
    loaded = prepare(copy.deepcopy(model), tiny_chat(), name="tiny", weights="int8", kernels=kernels)
    await check(reference, loaded)


def test_every_weight_but_the_embedding_is_of_eight_bits(kernels: Kernels) -> None:
    model = network(*NETWORKS["qwen2 whose head is its embedding"])
    loaded = prepare(copy.deepcopy(model), tiny_chat(), name="tiny", weights="int8", kernels=kernels)
    layers: list[Any] = decoder_layers(loaded)
    products = [linear.product for layer in layers for linear in layer.linears] + [loaded.model.lm_head.product]
    assert len(products) == 4 * 3 + 1
    for product in products:
        product = getattr(product, "_product", product)  # the head's, without its widening
        if isinstance(product, PackedProduct):
            assert product._panels.dtype == torch.int8
        else:
            assert isinstance(product, Int8Product)
            assert product._weight.numbers.dtype == torch.int8
    assert any(isinstance(product, PackedProduct) for product in products) == (kernels.stack(layers) is not None)
    assert torch.equal(loaded.model.model.embed_tokens.weight, model.model.embed_tokens.weight)


@pytest.mark.parametrize("adapter", [*ADAPTERS, None])
async def test_adapters_on_rounded_weights_equal_pefts(adapter: str | None, kernels: Kernels, tmp_path: Path) -> None:
    model = network(*FUSED["llama with biases"])
    folders = {name: make_adapter_folder(model, tmp_path / name, **spec) for name, spec in ADAPTERS.items()}
    reference = peft_model(rounded(model), folders)
    engine = fused_engine(model, kernels, "int8")
    try:
        for name, folder in folders.items():
            await engine.load_adapter(folder, name=name)
        prompts = placements(ADAPTERS[adapter].get("invocation")).values() if adapter else [TEXT]
        for prompt in prompts:
            params = SamplingParams(max_tokens=6, ignore_eos=True, logprobs=True, top_logprobs=3)
            request = Request(prompt=prompt, adapter=adapter, params=params)
            assert_equal(request, await engine.complete(request), reference)
        await engine.check_integrity()
    finally:
        await engine.aclose()


@pytest.mark.parametrize("kind", KERNELS)
async def test_bfloat16_follows_the_rounded_weights(kind: str) -> None:
    model = network(*FUSED["llama"]).to(torch.bfloat16)
    engine = fused_engine(model, kernels_named(kind, torch.bfloat16), "int8")
    try:
        await engine.warm(TEXT)
        prompt = (*TEXT, 7)
        score = await engine.score(Request(prompt=prompt), [[t] for t in range(0, 300, 30)])
        expected = logits(rounded(model).float(), prompt)[-1].log_softmax(-1)
        for row, token in zip(score.logprobs, range(0, 300, 30), strict=True):
            assert abs(row[0] - float(expected[token])) < 0.3
    finally:
        await engine.aclose()
