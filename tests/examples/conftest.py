"""One engine, and one server over it, for all examples."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from midstream.engine.engine import AsyncEngine
from midstream.session import Engine
from tests.server.running import Running, running


class KeptEngine(Engine):
    """An engine that stays for the next example."""

    def close(self) -> None:
        pass


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """The default model with its library."""
    engine = KeptEngine(AsyncEngine.load(dtype="float32"))
    engine.load_library()
    yield engine
    super(KeptEngine, engine).close()


@pytest.fixture(scope="session")
def served(engine: Engine) -> Iterator[Running]:
    with running(engine.aio) as server:
        yield server
