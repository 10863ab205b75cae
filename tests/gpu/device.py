"""What the tests on a card share."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from midstream.config import EngineConfig
from midstream.engine.engine import AsyncEngine
from midstream.models.cuda.graphs import GraphForward, GraphRecorder
from midstream.models.cuda.kernels import CudaKernels
from midstream.models.layer import FusedLayer
from midstream.models.load import prepare
from tests.tiny import tiny_chat

ON_A_CARD = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


class Counted(GraphRecorder):
    """Counts what is recorded and replayed."""

    def __init__(self) -> None:
        super().__init__()
        self.recorded = 0
        self.replayed = 0

    def record(self, forward: Any) -> Any:
        replay, output = super().record(forward)
        self.recorded += 1

        def counted() -> None:
            self.replayed += 1
            replay()

        return counted, output


def card_engine(model: Any, **config: Any) -> AsyncEngine:
    """An engine over a copy of `model` on the card, which must have its own kernels and recorded steps."""
    loaded = prepare(copy.deepcopy(model).to("cuda"), tiny_chat(), name="tiny")
    assert isinstance(loaded.kernels, CudaKernels)
    assert all(isinstance(layer, FusedLayer) for layer in loaded.model.model.layers)
    engine = AsyncEngine(loaded, EngineConfig(kv_budget_bytes=8 * 1024**2, **config))
    forward = engine._loop._runner._forward
    assert isinstance(forward, GraphForward)
    forward._recorder = Counted()
    return engine


def recorder(engine: AsyncEngine) -> Counted:
    found: Counted = engine._loop._runner._forward._recorder
    return found


def relative_error(found: Tensor, expected: Tensor) -> float:
    """‖found - expected‖ / ‖expected‖ in float64."""
    expected = expected.double().cpu()
    return float((found.double().cpu() - expected).norm() / expected.norm())
