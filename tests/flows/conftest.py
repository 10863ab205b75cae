"""A tiny engine with six tiny intrinsics, shared by the tests of flows.

Their contracts are the library's but for lengths: a token of the tiny tokenizer is a byte, and a random model does not
end a string that it may go on with.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import yaml

from midstream.engine.engine import AsyncEngine
from tests.flows.engines import check_idle, intrinsics_engine, make_intrinsics

REWRITTEN_CHARACTERS = 12


@pytest.fixture(scope="session")
def intrinsic_folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folders = make_intrinsics(tmp_path_factory.mktemp("intrinsics"))
    for folder in folders:
        contract = yaml.safe_load((folder / "io.yaml").read_text())
        contract["parameters"] = {"max_tokens": 98}
        if folder.name == "query_rewrite":
            schema = json.loads(contract["response_format"])
            schema["properties"]["rewritten_question"]["maxLength"] = REWRITTEN_CHARACTERS
            contract["response_format"] = json.dumps(schema)
        (folder / "io.yaml").write_text(yaml.safe_dump(contract))
    return folders


@pytest.fixture
async def engine(intrinsic_folders: list[Path]) -> AsyncIterator[AsyncEngine]:
    """At the end of a test nothing may run, wait or hold KV."""
    engine = await intrinsics_engine(intrinsic_folders)
    yield engine
    await check_idle(engine)
    await engine.aclose()
