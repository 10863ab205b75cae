"""Adapters on fused layers and compiled kernels against stock PEFT: greedy tokens identical, logits within 1e-3."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from midstream.config import EngineConfig
from midstream.engine.engine import AsyncEngine
from midstream.engine.runner import Runner
from midstream.engine.step import Step
from midstream.models.deltas import DeltaContext
from midstream.models.kernels import Kernels, TorchKernels
from midstream.models.layer import FusedLayer
from midstream.models.load import prepare
from midstream.models.native.stack import NativeStack
from midstream.models.products import WeightKind
from midstream.models.stack import FusedStack
from midstream.types import Completion, Request, SamplingParams
from tests.engine.test_parity import EIGHT, TEXT, check, placements
from tests.helpers import SEVEN, make_adapter_folder, tiny_config, tiny_model
from tests.models.native import KERNELS, PackedKernels, UnpackedKernels, decoder_layers, kernels_named
from tests.reference import greedy, logits, peft_model
from tests.tiny import tiny_chat

TARGETS: dict[str, Sequence[str]] = {
    "all seven": SEVEN,
    "only q_proj": ("q_proj",),
    "only k_proj and o_proj": ("k_proj", "o_proj"),
    "only v_proj and down_proj": ("v_proj", "down_proj"),
    "only up_proj": ("up_proj",),
}
SIX: dict[str, dict[str, Any]] = {
    "alora": {"targets": SEVEN, "invocation": (300,)},
    "alora of q": {"targets": ("q_proj",), "invocation": (301, 302), "rank": 3},
    "alora of v and down": {"targets": ("v_proj", "down_proj"), "invocation": EIGHT, "rank": 16},
    "lora": {"targets": SEVEN, "rank": 1},
    "lora of gate": {"targets": ("gate_proj", "o_proj"), "rank": 8, "use_rslora": True},
    "late alora": {"targets": SEVEN, "invocation": (303, 304, 305), "rank": 2},
}


@pytest.fixture(scope="module", params=[32])
def model(request: pytest.FixtureRequest) -> Any:
    """Heads of a size that the compiled kernels serve; a perceptron's width that their vectors do not divide."""
    fields = tiny_config(hidden=64).to_dict() | {"head_dim": request.param, "intermediate_size": 72}
    return tiny_model(LlamaConfig(**fields | {"initializer_range": 0.2}))


@pytest.fixture(scope="module")
def folders(model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("six")
    return {n: make_adapter_folder(model, root / n, seed=i, **s) for i, (n, s) in enumerate(SIX.items())}


@pytest.fixture(scope="module")
def reference(model: Any, folders: dict[str, Path]) -> Any:
    return peft_model(model, folders)


@pytest.fixture(params=KERNELS)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return kernels_named(request.param)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """All steps that are run meanwhile."""
    run, seen = Runner.run, []

    def note(self: Runner, step: Step) -> Any:
        seen.append(step)
        return run(self, step)

    monkeypatch.setattr(Runner, "run", note)
    return seen


@pytest.fixture
def one_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many adapters had rows in each step that went through all layers in one call."""
    run, seen = NativeStack.__call__, []

    def note(self: NativeStack, x: Any, positions: Any, plan: Any, context: DeltaContext) -> bool:
        served = run(self, x, positions, plan, context)
        if served:
            seen.append(len(context.groups))
        return served

    monkeypatch.setattr(NativeStack, "__call__", note)
    return seen


def fused_engine(model: Any, kernels: Kernels, weights: WeightKind | None = None, **config: Any) -> AsyncEngine:
    loaded = prepare(copy.deepcopy(model), tiny_chat(), name="tiny", kernels=kernels, weights=weights)
    assert all(isinstance(layer, FusedLayer) for layer in decoder_layers(loaded))
    assert isinstance(loaded.model.model.layers[0], FusedStack) == isinstance(kernels, PackedKernels)
    assert loaded.extents == (type(kernels) is not TorchKernels)
    return AsyncEngine(loaded, EngineConfig(**{"kv_budget_bytes": 8 * 1024**2, **config}))


@pytest.fixture
async def engine(model: Any, kernels: Kernels, folders: dict[str, Path]) -> AsyncIterator[AsyncEngine]:
    engine = fused_engine(model, kernels, max_step_tokens=64)
    for name, folder in folders.items():
        await engine.load_adapter(folder, name=name)
    yield engine
    await engine.check_integrity()
    await engine.aclose()


def prompt_of(name: str | None, text: Sequence[int] = TEXT) -> tuple[int, ...]:
    return (*text, *(() if name is None else SIX[name].get("invocation", ())))


def request_of(name: str | None, text: Sequence[int] = TEXT, max_tokens: int = 10) -> Request:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, logprobs=True, top_logprobs=3)
    return Request(prompt=prompt_of(name, text), adapter=name, params=params)


def assert_equal(request: Request, answer: Completion, reference: Any) -> None:
    """The answer's tokens, and the log-probability of each, are PEFT's."""
    assert list(answer.token_ids) == greedy(reference, request.prompt, request.adapter, request.params.max_tokens)
    table = logits(reference, [*request.prompt, *answer.token_ids], request.adapter).log_softmax(-1)
    assert answer.choices[0].logprobs is not None
    for row, found in enumerate(answer.choices[0].logprobs, start=len(request.prompt) - 1):
        assert all(abs(float(table[row, other.token_id]) - other.logprob) < 1e-3 for other in found.top)


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("invocation", [None, EIGHT], ids=["lora", "alora"])
async def test_one_adapter_equals_pefts(
    invocation: Sequence[int] | None, targets: str, model: Any, kernels: Kernels, tmp_path: Path
) -> None:
    folder = make_adapter_folder(model, tmp_path / "a", targets=TARGETS[targets], invocation=invocation)
    alone = peft_model(model, {"a": folder})
    engine = fused_engine(model, kernels)
    try:
        await engine.load_adapter(folder, name="a")
        for prompt in placements(invocation).values():
            await check(engine, alone, prompt, "a")
            await check(engine, alone, prompt, None)
        await engine.check_integrity()
    finally:
        await engine.aclose()


async def test_six_adapters_in_one_step_share_a_prefix(
    engine: AsyncEngine,
    kernels: Kernels,
    reference: Any,
    steps: list[Step],
    one_calls: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    served: list[bool] = []
    add = kernels.add_deltas

    def note(*args: Any) -> bool:
        served.append(add(*args))
        return served[-1]

    monkeypatch.setattr(kernels, "add_deltas", note)
    await engine.warm(TEXT)
    requests = [request_of(name) for name in SIX]
    answers = await asyncio.gather(*(engine.complete(request) for request in requests))
    for request, answer in zip(requests, answers, strict=True):
        assert_equal(request, answer, reference)
        # An aLoRA reads what the base has of the text, a LoRA has KV of its own.
        assert (answer.usage.cached_tokens >= len(TEXT)) == ("invocation" in SIX[str(request.adapter)])
    assert [step for step in steps if len(step.groups) == 6 and step.num_tokens == 6]
    # Layer by layer each product adds its deltas; torch's kernels decline, and one call has them in it.
    assert any(served) == isinstance(kernels, UnpackedKernels)
    assert (6 in one_calls) == isinstance(kernels, PackedKernels)


@pytest.mark.parametrize("model", [32, 64], indirect=True)
async def test_prefill_and_decode_of_adapters_and_the_base_in_one_step(
    engine: AsyncEngine, reference: Any, steps: list[Step]
) -> None:
    names = [None, *SIX, *reversed(SIX), None]
    texts = [TEXT[7 * (i % 5) :] + TEXT[: i % 3] for i in range(len(names))]
    requests = [request_of(name, text, 4 + 2 * i) for i, (name, text) in enumerate(zip(names, texts, strict=True))]
    answers = await asyncio.gather(*(engine.complete(request) for request in requests))
    for request, answer in zip(requests, answers, strict=True):
        assert_equal(request, answer, reference)
    counts = [{segment.count for segment in step.segments} for step in steps]
    assert any(1 in found and max(found) > 32 for found in counts)
    assert any(1 in found and 1 < max(found) <= 32 for found in counts)
    assert any(len({digest for digest, *_ in step.groups}) > 2 for step in steps)


@pytest.mark.parametrize("name", [*SIX, None])
async def test_warm_calls_equal_cold_ones(
    name: str | None, engine: AsyncEngine, model: Any, kernels: Kernels, folders: dict[str, Path], reference: Any
) -> None:
    request = request_of(name)
    tokens = [[token] for token in range(0, 320, 5)]
    cold = await engine.complete(request)
    assert_equal(request, cold, reference)
    cold_scores = torch.tensor((await engine.score(request, tokens)).logprobs)
    # Again with all its KV there, after other adapters, and on a prefix that was read a bit at a time.
    await asyncio.gather(*(engine.complete(request_of(other)) for other in SIX))
    warm = await engine.complete(request)
    assert warm.usage.cached_tokens >= len(request.prompt) - 1
    assert warm.token_ids == cold.token_ids
    warm_scores = torch.tensor((await engine.score(request, tokens)).logprobs)
    assert (warm_scores - cold_scores).abs().max() < 1e-3
    fresh = fused_engine(model, kernels, max_step_tokens=5)
    try:
        if name is not None:
            await fresh.load_adapter(folders[name], name=name)
        for end in (1, 2, 31, len(TEXT)):
            await fresh.warm(TEXT[:end])
        assert_equal(request, await fresh.complete(request), reference)
    finally:
        await fresh.aclose()
