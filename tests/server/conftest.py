"""One running server for all tests that do not need settings of their own, and one in front of another."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.server.running import Running, front_of, make_engine, running

# What these hold of a server holds of one in front of another server too.
_ALSO_IN_FRONT = {"test_completions", "test_extensions", "test_intrinsics"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "live" in metafunc.fixturenames and metafunc.module.__name__.rpartition(".")[2] in _ALSO_IN_FRONT:
        metafunc.parametrize("live", ["embedded", "front"], indirect=True, scope="session")


@pytest.fixture(scope="session")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server over an engine in this process."""
    with running(make_engine(tmp_path_factory.mktemp("served"))) as server:
        yield server


@pytest.fixture(scope="session")
def front(embedded: Running) -> Iterator[Running]:
    """A server in front of that one."""
    with running(front_of(embedded.url), bottom=embedded.engine) as server:
        yield server


@pytest.fixture(scope="session")
def live(request: pytest.FixtureRequest) -> Running:
    server: Running = request.getfixturevalue(getattr(request, "param", "embedded"))
    return server


@pytest.fixture(scope="session")
def server_url(live: Running) -> str:
    return live.url
