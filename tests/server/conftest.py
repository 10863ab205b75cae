"""One running server for all tests that do not need settings of their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.server.running import Running, make_engine, running


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    engine = make_engine(tmp_path_factory.mktemp("served"))
    with running(engine) as server:
        yield server


@pytest.fixture(scope="session")
def server_url(live: Running) -> str:
    return live.url
