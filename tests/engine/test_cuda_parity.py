"""The engine on the device's kernels and recorded steps against stock PEFT, on whatever device there is.

Without a card the programs are plain ones that follow the same tables, or Triton's where its interpreter is, and a
recorded step is called again.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from midstream.config import EngineConfig
from midstream.engine.engine import AsyncEngine
from midstream.models.cuda.graphs import GraphForward
from midstream.models.cuda.kernels import CudaKernels
from midstream.models.layer import FusedLayer
from midstream.models.load import prepare
from midstream.models.pool import KVPool
from tests.engine.test_native_parity import SIX, TEXT, assert_equal, folders, model, reference, request_of
from tests.models.cuda.plain import MULTIPROCESSORS, Again, PlainPrograms
from tests.models.cuda.triton import ON_GPU, needs_triton, triton_programs
from tests.tiny import tiny_chat

__all__ = ["folders", "model", "reference"]

pytestmark = pytest.mark.skipif(ON_GPU, reason="on a card tests/gpu does the same with real recordings")


@pytest.fixture(params=["plain", pytest.param("triton", marks=needs_triton)])
def kernels(request: pytest.FixtureRequest) -> CudaKernels:
    programs = PlainPrograms() if request.param == "plain" else triton_programs()
    return CudaKernels(programs, MULTIPROCESSORS)


@pytest.fixture
async def engine(model: Any, kernels: CudaKernels, folders: dict[str, Path]) -> AsyncIterator[AsyncEngine]:
    loaded = prepare(copy.deepcopy(model), tiny_chat(), name="tiny", kernels=kernels)
    assert all(isinstance(layer, FusedLayer) for layer in loaded.model.model.layers)
    engine = AsyncEngine(loaded, EngineConfig(kv_budget_bytes=8 * 1024**2, max_step_tokens=64))
    pool = KVPool(loaded.kv_shapes, engine._core.tree.num_slots, loaded.dtype, loaded.device, spare=1)
    engine._loop._runner._forward = GraphForward(loaded, pool, Again())
    for name, folder in folders.items():
        await engine.load_adapter(folder, name=name)
    yield engine
    await engine.check_integrity()
    await engine.aclose()


def recorder(engine: AsyncEngine) -> Again:
    found: Again = engine._loop._runner._forward._recorder
    return found


async def test_six_adapters_and_the_base_share_a_prefix(engine: AsyncEngine, reference: Any) -> None:
    await engine.warm(TEXT)
    requests = [request_of(name, max_tokens=6) for name in [*SIX, None]]
    answers = await asyncio.gather(*(engine.complete(request) for request in requests))
    for request, answer in zip(requests, answers, strict=True):
        assert_equal(request, answer, reference)
    assert recorder(engine).replayed > 0


async def test_one_request_after_the_other(engine: AsyncEngine, reference: Any) -> None:
    for name in ("alora", "alora of v and down", None, "late alora"):
        request = request_of(name, TEXT[:40], 6)
        assert_equal(request, await engine.complete(request), reference)
    # One recording of single rows with adapters, another without; and perhaps the invocations'.
    assert recorder(engine).replayed > 2 * recorder(engine).recorded
