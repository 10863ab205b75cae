"""The curl examples of the documentation, run as they stand against the default model with its library."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from midstream.config import ServerConfig
from midstream.engine.engine import AsyncEngine
from midstream.server.folders import load_adapters
from tests.server.running import Running, running

ROOT = Path(__file__).parents[2]
TEXTS = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/server.md")]
BLOCKS = [block for text in TEXTS for block in re.findall(r"```sh\n(.*?)```", text, re.S)]
EXAMPLES = [block for block in BLOCKS if block.startswith("curl")]


@pytest.fixture(scope="module")
def library() -> Iterator[Running]:
    engine = AsyncEngine.load(dtype="float32")
    asyncio.run(load_adapters(engine, ServerConfig()))
    with running(engine) as server:
        yield server


def run(example: str, server: Running) -> Any:
    command = example.replace("localhost:8000", server.url.removeprefix("http://"))
    return json.loads(subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_an_example_works(library: Running, number: int) -> None:
    found = run(EXAMPLES[number], library)
    assert "error" not in json.dumps(found), found


def test_what_the_examples_answer(library: Running) -> None:
    capital, jailbreak, answerable, several = (
        run(next(e for e in EXAMPLES if mark in e), library)
        for mark in ("capital of France", '"model": "jailbreak"', "intrinsics/answerability", '"requirement_check"')
    )
    assert "Paris" in capital["choices"][0]["message"]["content"]
    assert jailbreak["choices"][0]["message"]["content"] == '"yes"'
    assert set(answerable["probabilities"]) == {"answerable", "unanswerable"}
    assert [entry["intrinsic"] for entry in several["data"]] == ["jailbreak", "answerability", "requirement_check"]
    assert several["data"][2]["result"] in ("met", "not_met")
