"""A tiny engine with six tiny intrinsics, shared by the tests of flows."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from midstream.engine.engine import AsyncEngine
from tests.flows.engines import check_idle, intrinsics_engine, make_short_intrinsics


@pytest.fixture(scope="session")
def intrinsic_folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return make_short_intrinsics(tmp_path_factory.mktemp("intrinsics"))


@pytest.fixture
async def engine(intrinsic_folders: list[Path]) -> AsyncIterator[AsyncEngine]:
    """At the end of a test nothing may run, wait or hold KV."""
    engine = await intrinsics_engine(intrinsic_folders)
    yield engine
    await check_idle(engine)
    await engine.aclose()
