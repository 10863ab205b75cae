"""OpenAI's client, and the servers that clients are pointed at beside `live`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import openai
import pytest

from midstream.engine.engine import AsyncEngine
from midstream.models.source import DEFAULT_MODEL
from tests.server.clients.serving import LIBRARY, load_adapters, write_switch
from tests.server.running import Running, running


@pytest.fixture(scope="session")
def client(live: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
async def aclient(live: Running) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="session")
def switch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of adapters in the layout that Mellea reads, with the contracts that it expects of them."""
    return write_switch(tmp_path_factory.mktemp("switch"))


@pytest.fixture(scope="session")
def trained(switch: Path) -> Iterator[Running]:
    """The default model with adapters of the library: with their own contracts, and with those of `switch`."""
    engine = AsyncEngine.load(DEFAULT_MODEL, dtype="float32")
    own = {name: LIBRARY / name for name in ("jailbreak", "requirement_check")}
    load_adapters(engine, own | {folder.name: folder for folder in (switch / "io_configs").iterdir()})
    with running(engine) as server:
        yield server
