"""A listening server over a tiny model, an embedded engine of the same weights, and a backend to the server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from midstream.engine.engine import AsyncEngine
from midstream.remote import RemoteBackend
from tests.helpers import make_adapter_folder, tiny_llama
from tests.server.running import Running, make_engine, running
from tests.tiny import tiny_chat


def engine_with_note(root: Path) -> AsyncEngine:
    """The server's adapters, and one that a plain text invokes."""
    engine = make_engine(root)
    folder = make_adapter_folder(tiny_llama(), root / "note", seed=7, invocation=tiny_chat().encode("@n:"))
    contract = {"model": None, "response_format": json.dumps({"enum": ["yes", "no"]}), "transformations": None}
    (folder / "io.yaml").write_text(json.dumps({**contract, "parameters": {"max_tokens": 9}}))
    asyncio.run(engine.load_adapter(folder))
    return engine


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(engine_with_note(tmp_path_factory.mktemp("served"))) as server:
        yield server


@pytest.fixture(scope="session")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AsyncEngine]:
    engine = engine_with_note(tmp_path_factory.mktemp("embedded"))
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
