"""A listening server over a tiny model, an embedded engine of the same weights, and a backend to the server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest

from midstream.engine.engine import AsyncEngine
from midstream.remote import RemoteBackend
from tests.server.running import Running, make_engine, running


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(make_engine(tmp_path_factory.mktemp("served"))) as server:
        yield server


@pytest.fixture(scope="session")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AsyncEngine]:
    engine = make_engine(tmp_path_factory.mktemp("embedded"))
    yield engine
    asyncio.run(engine.aclose())


@pytest.fixture
async def far(server: Running) -> AsyncIterator[RemoteBackend]:
    async with RemoteBackend(server.url) as backend:
        yield backend


@pytest.fixture
async def near(embedded: AsyncEngine, server: Running) -> AsyncEngine:
    """The embedded engine, its KV and the server's emptied, so that both are found to reuse the same."""
    await embedded.clear_cache()
    await server.service.engine.clear_cache()
    return embedded
