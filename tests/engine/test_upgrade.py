"""A model that answers on torch's kernels goes over to compiled ones: nothing that runs or is cached notices."""

from __future__ import annotations

import asyncio
import copy
import gc
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from midstream.config import EngineConfig
from midstream.engine.engine import AsyncEngine
from midstream.engine.request import Branch
from midstream.engine.runner import Runner
from midstream.engine.step import Step
from midstream.models.kernels import Kernels, TorchKernels
from midstream.models.linear import AdapterLinear
from midstream.models.load import LoadedModel, prepare
from midstream.models.native.products import PackedProduct
from midstream.models.products import Int8Weight, Product, TorchProduct, WeightKind
from midstream.models.stack import FusedStack
from midstream.types import Request
from tests.engine.test_native_parity import SIX, TEXT, assert_equal, folders, model, reference, request_of
from tests.models.native import DTYPES, KERNELS, PackedKernels, kernels_named
from tests.models.test_fused_layers import FUSED, KEPT, network
from tests.reference import greedy
from tests.tiny import tiny_chat

__all__ = ["folders", "model", "reference"]  # fixtures

COMPILED = KERNELS[1:]
# Products of these layers: q/k/v, o, gate/up, down.
IN_LAYER = 4


@pytest.fixture
def pending(monkeypatch: pytest.MonkeyPatch) -> Future[Kernels]:
    """The kernels that all models wait for here, until a test sets them."""
    future: Future[Kernels] = Future()
    monkeypatch.setattr("midstream.models.load.start_kernels", lambda *_: future)
    return future


@pytest.fixture(params=COMPILED)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return kernels_named(request.param)


def started(network: Any, weights: WeightKind | None = None) -> LoadedModel:
    """A copy of the model, on torch's kernels and waiting for others."""
    loaded = prepare(copy.deepcopy(network), tiny_chat(), name="tiny", weights=weights, wait_for_kernels=False)
    assert type(loaded.kernels) is TorchKernels
    assert not loaded.extents
    assert loaded.pending is not None
    return loaded


@asynccontextmanager
async def running(
    loaded: LoadedModel, folders: dict[str, Path] | None = None, **config: Any
) -> AsyncIterator[AsyncEngine]:
    engine = AsyncEngine(loaded, EngineConfig(**{"kv_budget_bytes": 8 * 1024**2, **config}))
    try:
        for name, folder in (folders or {}).items():
            await engine.load_adapter(folder, name=name)
        yield engine
        await engine.check_integrity()
    finally:
        await engine.aclose()


def linears(loaded: LoadedModel) -> list[AdapterLinear]:
    return [module for module in loaded.model.modules() if isinstance(module, AdapterLinear)]


async def until(happened: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not happened():
            await asyncio.sleep(0.001)


def assert_upgraded(loaded: LoadedModel, kernels: Kernels) -> None:
    assert loaded.kernels is kernels
    assert loaded.extents
    assert loaded.pending is None
    assert all(linear.kernels is kernels for linear in linears(loaded))
    assert isinstance(loaded.model.model.layers[0], FusedStack) == isinstance(kernels, PackedKernels)


# ---------------------------------------------------------------------- what runs meanwhile


class Gate:
    """Lets the kernels come at an engine's third step; from then on each step waits for the next change of the model.

    `moved`: how many of its linear layers had moved at each step.
    """

    def __init__(self, engine: AsyncEngine, pending: Future[Kernels], kernels: Kernels) -> None:
        self._engine, self._pending, self._kernels = engine, pending, kernels
        self.moved: list[int] = []

    def hold(self) -> None:
        loaded = self._engine._loaded
        self.moved.append(sum(linear.kernels is self._kernels for linear in linears(loaded)))
        if len(self.moved) == 3:
            self._pending.set_result(self._kernels)
        deadline = time.monotonic() + 60
        while self._pending.done() and loaded.pending is not None and not self._engine._loop._inbox:
            assert time.monotonic() < deadline
            time.sleep(0.001)


@contextmanager
def gate(engine: AsyncEngine, pending: Future[Kernels], kernels: Kernels) -> Iterator[Gate]:
    run, found = Runner.run, Gate(engine, pending, kernels)

    def held(self: Runner, step: Step) -> dict[Branch, Tensor]:
        found.hold()
        return run(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runner, "run", held)
        yield found


async def test_requests_in_flight(
    model: Any, folders: dict[str, Path], reference: Any, pending: Future[Kernels], kernels: Kernels
) -> None:
    """Prefills in chunks, decoding, all adapters and the base: each piece of the model moves between two steps."""
    loaded = started(model)
    async with running(loaded, folders, max_step_tokens=64) as engine:
        with gate(engine, pending, kernels) as held:
            requests = [request_of(name, TEXT[i:], 12 + i) for i, name in enumerate([None, *SIX])]
            answers = await asyncio.gather(*(engine.complete(request) for request in requests))
        for request, answer in zip(requests, answers, strict=True):
            assert_equal(request, answer, reference)
        # Two layers, the head; then all in one.
        assert held.moved[:7] == [0, 0, 0, IN_LAYER, 2 * IN_LAYER, 2 * IN_LAYER + 1, 2 * IN_LAYER + 1]
        assert len(held.moved) > 10
        assert_upgraded(loaded, kernels)


async def test_a_stream_in_flight(model: Any, reference: Any, pending: Future[Kernels], kernels: Kernels) -> None:
    request = request_of(None, max_tokens=20)
    async with running(started(model)) as engine:
        with gate(engine, pending, kernels):
            found = [token async for delta in engine.stream(request) for token in delta.token_ids]
        assert_upgraded(engine._loaded, kernels)
    assert found == greedy(reference, request.prompt, None, 20)


# ---------------------------------------------------------------------- before and after


@pytest.mark.parametrize("name", [*SIX, None])
async def test_what_was_computed_before_is_reused_after(
    name: str | None,
    model: Any,
    folders: dict[str, Path],
    reference: Any,
    pending: Future[Kernels],
    kernels: Kernels,
) -> None:
    loaded = started(model)
    async with running(loaded, folders) as engine:
        request = request_of(name)
        before = await engine.complete(request)
        assert_equal(request, before, reference)
        pending.set_result(kernels)
        await until(lambda: loaded.pending is None)
        assert_upgraded(loaded, kernels)
        after = await engine.complete(request)
        assert_equal(request, after, reference)
        assert after.usage.cached_tokens == len(request.prompt) - 1


async def test_a_fan_out_on_a_conversation_of_before(
    model: Any, folders: dict[str, Path], reference: Any, pending: Future[Kernels], kernels: Kernels
) -> None:
    loaded = started(model)
    async with running(loaded, folders) as engine:
        await engine.warm(TEXT)
        pending.set_result(kernels)
        await until(lambda: loaded.pending is None)
        requests = [request_of(name) for name in (None, *SIX)]
        answers = await asyncio.gather(*(engine.complete(request) for request in requests))
        for request, answer in zip(requests, answers, strict=True):
            assert_equal(request, answer, reference)
            shared = request.adapter is None or "invocation" in SIX[request.adapter]
            assert answer.usage.cached_tokens >= len(TEXT) - 1 or not shared


async def scores(engine: AsyncEngine) -> Tensor:
    prompt = tuple((13 * i + 5) % 310 + 4 for i in range(90))
    return torch.tensor((await engine.score(Request(prompt=prompt), [[t] for t in range(0, 320, 5)])).logprobs)


@pytest.mark.parametrize("weights", [None, "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", COMPILED)
@pytest.mark.parametrize("name", [*FUSED, "qwen3", "gemma3", "phi3"])
async def test_every_kind_of_model(
    name: str, kind: str, dtype: torch.dtype, weights: WeightKind | None, pending: Future[Kernels]
) -> None:
    """Fused layers and transformers' own, rounded weights and plain ones: the same numbers before, after, and anew."""
    network_of = network(*(FUSED | KEPT)[name]).to(dtype)
    loaded = started(network_of, weights)
    kernels = kernels_named(kind, dtype)
    within = 1e-3 if dtype == torch.float32 else 0.4  # bfloat16's rounding, of log-probabilities down to -15
    async with running(loaded) as engine:
        before = await scores(engine)
        pending.set_result(kernels)
        await until(lambda: loaded.pending is None)
        assert loaded.kernels is kernels
        assert loaded.extents
        assert all(linear.kernels is kernels for linear in linears(loaded))
        after = await scores(engine)
        await engine.clear_cache()
        anew = await scores(engine)
    assert (after - before).abs().max() < within
    assert (anew - before).abs().max() < within


@pytest.mark.parametrize("kind", COMPILED)
async def test_eight_bit_keys_and_values_of_before(kind: str, model: Any, pending: Future[Kernels]) -> None:
    loaded = started(model)
    async with running(loaded, kv_dtype="int8") as engine:
        before = await scores(engine)
        pending.set_result(kernels_named(kind))
        await until(lambda: loaded.pending is None)
        after = await scores(engine)
    assert (after - before).abs().max() < 1e-3


async def test_rounded_weights_are_the_same_numbers(model: Any, pending: Future[Kernels]) -> None:
    loaded = started(model, "int8")
    old = [linear.product for linear in linears(loaded)]
    numbers = [product.held().weight for product in old if isinstance(product, TorchProduct)]
    kernels = kernels_named("stack")
    async with running(loaded):
        pending.set_result(kernels)
        await until(lambda: loaded.pending is None)
    assert len(numbers) == len(linears(loaded))
    for weight, linear in zip(numbers, linears(loaded), strict=True):
        assert isinstance(weight, Int8Weight)
        assert isinstance(linear.product, PackedProduct)
        whole = linear.product._panels.transpose(1, 2).flatten(0, 1)[: linear.out_features].flatten(1)
        assert torch.equal(whole, weight.numbers)
        assert torch.equal(linear.product._scales, weight.scales)


# ---------------------------------------------------------------------- memory


async def test_no_weight_stays_twice(model: Any, pending: Future[Kernels], monkeypatch: pytest.MonkeyPatch) -> None:
    """Never those of more than one layer; and none afterwards."""
    loaded = started(model)
    old = [weakref.ref(linear.product) for linear in linears(loaded)]
    kernels, alive = kernels_named("stack"), []

    def noted(product: Product) -> Product:
        alive.append(sum(each() is not None for each in old))
        return PackedKernels.repacked(kernels, product)

    monkeypatch.setattr(kernels, "repacked", noted)
    async with running(loaded):
        pending.set_result(kernels)
        await until(lambda: loaded.pending is None)
    del noted
    gc.collect()
    assert alive == [9] * IN_LAYER + [5] * IN_LAYER + [1]
    assert [each() for each in old] == [None] * len(old)


async def test_what_was_seen_of_layers_is_forgotten(model: Any, pending: Future[Kernels]) -> None:
    loaded = started(model)
    assert loaded.pending is not None
    seen = [weakref.ref(each.given) for each in loaded.pending.seen.values()]
    assert len(seen) == 2
    async with running(loaded):
        pending.set_result(kernels_named("stack"))
        await until(lambda: loaded.pending is None)
    gc.collect()
    assert [each() for each in seen] == [None, None]


async def test_what_is_pending_keeps_no_engine(model: Any, pending: Future[Kernels]) -> None:
    loaded = started(model)
    engine = AsyncEngine(loaded, EngineConfig(kv_budget_bytes=8 * 1024**2))
    await engine.aclose()
    core = weakref.ref(engine._core)
    del engine
    gc.collect()
    assert core() is None
    pending.set_result(kernels_named("stack"))
    assert type(loaded.kernels) is TorchKernels
