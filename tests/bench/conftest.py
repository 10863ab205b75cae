"""A tiny engine without a library, and a machine that need not be measured."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from midstream.bench import machine, work
from midstream.session import Engine
from tests.helpers import tiny_llama
from tests.tiny import tiny_engine


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine(tiny_engine(tiny_llama())) as engine:
        yield engine
        engine.portal.run(engine.aio.check_integrity())


@pytest.fixture
def known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """20 GB/s and 100 GFLOP/s, without reading and multiplying hundreds of megabytes."""
    for module in (machine, work):
        monkeypatch.setattr(module, "read_bandwidth", lambda device: 20.0)
    monkeypatch.setattr(machine, "matrix_throughput", lambda dtype, device: 100.0)
