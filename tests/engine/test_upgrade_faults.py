"""What goes wrong while a model goes over to compiled kernels: it goes on, right, on what it has."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from midstream.config import EngineConfig
from midstream.engine.engine import AsyncEngine
from midstream.engine.loop import EngineLoop
from midstream.errors import EngineStopped
from midstream.models.kernels import Kernels, TorchKernels
from midstream.models.load import prepare
from midstream.models.products import Product
from tests.engine.test_native_parity import SIX, assert_equal, folders, model, reference, request_of
from tests.engine.test_upgrade import assert_upgraded, kernels, linears, pending, running, started, until
from tests.models.native import decoder_layers, kernels_named
from tests.tiny import tiny_chat

__all__ = ["folders", "kernels", "model", "pending", "reference"]  # fixtures

IN_LAYER = 4


async def test_a_closed_engine_leaves_the_rest_to_the_next(
    model: Any, reference: Any, pending: Future[Kernels], kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = started(model)
    calls, call = [], EngineLoop.call

    def closing(self: EngineLoop, function: Callable[[], Any]) -> Future[Any]:
        if threading.current_thread().name == "midstream-upgrade":
            calls.append(function)
            if len(calls) == 2:
                raise EngineStopped("the engine is closed")
        return call(self, function)

    monkeypatch.setattr(EngineLoop, "call", closing)
    pending.set_result(kernels)
    request = request_of(None)
    async with running(loaded) as engine:
        await until(lambda: len(calls) == 2)
        assert_equal(request, await engine.complete(request), reference)
        assert [linear.kernels is kernels for linear in linears(loaded)] == [True] * 4 + [False] * 5
    async with running(loaded) as engine:
        await until(lambda: loaded.pending is None)
        assert_upgraded(loaded, kernels)
        assert_equal(request, await engine.complete(request), reference)


async def test_closing_waits_for_what_is_being_prepared(
    model: Any, pending: Future[Kernels], kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread inside a library must not be there any more when Python ends."""
    loaded = started(model)
    begun, go_on, repacked = threading.Event(), threading.Event(), kernels.repacked

    def waiting(product: Product) -> Product:
        begun.set()
        assert go_on.wait(60)
        return repacked(product)

    monkeypatch.setattr(kernels, "repacked", waiting)
    pending.set_result(kernels)
    engine = AsyncEngine(loaded, EngineConfig(kv_budget_bytes=8 * 1024**2))
    await until(begun.is_set)
    closing = asyncio.create_task(engine.aclose())
    await asyncio.sleep(0.05)
    assert not closing.done()
    go_on.set()
    await closing
    assert "midstream-upgrade" not in {thread.name for thread in threading.enumerate()}
    assert not any(linear.kernels is kernels for linear in linears(loaded))


async def test_kernels_that_come_after_the_end_change_nothing(
    model: Any, pending: Future[Kernels], kernels: Kernels
) -> None:
    loaded = started(model)
    async with running(loaded) as engine:
        await engine.complete(request_of(None))
    pending.set_result(kernels)
    assert "midstream-upgrade" not in {thread.name for thread in threading.enumerate()}
    assert loaded.pending is not None


async def test_a_layer_that_gives_other_numbers_stays(
    model: Any, folders: dict[str, Path], reference: Any, pending: Future[Kernels], caplog: pytest.LogCaptureFixture
) -> None:
    """And all is served without what needs every layer."""
    loaded = started(model)
    kernels = kernels_named("stack")
    right, calls = kernels.gated, []

    def wrong_at_first(both: Tensor) -> Tensor:
        calls.append(1)
        return right(both) + float(len(calls) == 1)

    kernels.gated = wrong_at_first  # type: ignore[method-assign]
    async with running(loaded, folders) as engine:
        pending.set_result(kernels)
        await until(lambda: loaded.pending is None)
        assert "layer 0 stays on torch's kernels" in caplog.text
        first, second = decoder_layers(loaded)
        assert type(first.kernels) is TorchKernels
        assert second.kernels is kernels
        assert not loaded.extents
        requests = [request_of(name) for name in (None, *SIX)]
        answers = await asyncio.gather(*(engine.complete(request) for request in requests))
    for request, answer in zip(requests, answers, strict=True):
        assert_equal(request, answer, reference)


async def test_weights_that_cannot_be_laid_out(
    model: Any,
    reference: Any,
    pending: Future[Kernels],
    kernels: Kernels,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Half of the model has moved, which is as good as any other half."""
    loaded = started(model)
    asked: list[Product] = []
    repacked = kernels.repacked

    def failing(product: Product) -> Product:
        asked.append(product)
        if len(asked) > IN_LAYER + 1:
            raise MemoryError("no memory is left")
        return repacked(product)

    monkeypatch.setattr(kernels, "repacked", failing)
    request = request_of(None)
    async with running(loaded) as engine:
        pending.set_result(kernels)
        await until(lambda: "the compiled kernels cannot be used" in caplog.text)
        assert [layer.kernels is kernels for layer in decoder_layers(loaded)] == [True, False]
        assert_equal(request, await engine.complete(request), reference)


@pytest.mark.parametrize("failed", [False, True], ids=["none", "error"])
async def test_kernels_that_never_come(
    failed: bool, model: Any, reference: Any, pending: Future[Kernels], caplog: pytest.LogCaptureFixture
) -> None:
    """The reason is in the log already where there are none; an error of our own gets into it."""
    loaded = started(model)
    products = [linear.product for linear in linears(loaded)]
    async with running(loaded) as engine:
        if failed:
            pending.set_exception(ValueError("not foreseen"))
            await until(lambda: "not foreseen" in caplog.text)
        else:
            pending.set_result(TorchKernels())
            await until(lambda: loaded.pending is None)
        assert [linear.product for linear in linears(loaded)] == products
        assert type(loaded.kernels) is TorchKernels
        request = request_of(None)
        assert_equal(request, await engine.complete(request), reference)


async def test_kernels_that_are_there_are_taken_at_once(model: Any, pending: Future[Kernels], kernels: Kernels) -> None:
    pending.set_result(kernels)
    loaded = prepare(copy.deepcopy(model), tiny_chat(), name="tiny", wait_for_kernels=False)
    assert_upgraded(loaded, kernels)
