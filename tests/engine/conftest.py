"""One tiny model with a family of adapters, shared by the engine's tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from midstream.engine.engine import AsyncEngine
from tests.engine.invoked import ADAPTERS, running
from tests.helpers import SEVEN, make_adapter_folder, tiny_llama
from tests.reference import peft_model
from tests.tiny import tiny_engine

SETTINGS: dict[str, dict[str, Any]] = {
    "alora": {"targets": SEVEN, "invocation": (300,)},
    "other": {"targets": SEVEN, "invocation": (301, 302, 303), "rank": 6},
    "third": {"targets": ("q_proj",), "invocation": (300, 304)},
    "lora": {"targets": SEVEN},
    "lora2": {"targets": ("v_proj", "down_proj"), "rank": 8},
}


@pytest.fixture(scope="session")
def model() -> Any:
    return tiny_llama()


@pytest.fixture(scope="session")
def folders(model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {n: make_adapter_folder(model, root / n, seed=i, **s) for i, (n, s) in enumerate(SETTINGS.items())}


async def loaded(model: Any, folders: dict[str, Path], **config: Any) -> AsyncEngine:
    engine = tiny_engine(model, **config)
    for name, folder in folders.items():
        await engine.load_adapter(folder, name=name)
    return engine


@pytest.fixture
async def engine(model: Any, folders: dict[str, Path]) -> AsyncIterator[AsyncEngine]:
    engine = await loaded(model, folders)
    yield engine
    await engine.check_integrity()
    await engine.aclose()


@pytest.fixture(scope="session")
def callee_folders(model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters whose invocations are texts that a constraint can make the base model write."""
    root = tmp_path_factory.mktemp("callees")
    return {n: make_adapter_folder(model, root / n, seed=i, **s) for i, (n, s) in enumerate(ADAPTERS.items())}


@pytest.fixture(scope="session")
def peft(model: Any, callee_folders: dict[str, Path]) -> Any:
    return peft_model(model, callee_folders)


@pytest.fixture
async def calling(model: Any, callee_folders: dict[str, Path]) -> AsyncIterator[AsyncEngine]:
    async with running(model, callee_folders) as engine:
        yield engine
