"""A tiny random model with tiny random adapters that are named like the shipped intrinsics."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from midstream.engine.engine import AsyncEngine
from tests.flows.backends import LIBRARY, READS
from tests.helpers import SEVEN, make_adapter_folder, tiny_llama
from tests.tiny import tiny_chat, tiny_engine

REWRITTEN_CHARACTERS = 12


def make_intrinsics(folder: Path, names: Sequence[str] = tuple(READS)) -> list[Path]:
    """Adapter folders with the contracts of the library, each of other weights."""
    made = []
    for seed, name in enumerate(names):
        text = f"<|im_start|>{name}\n"
        at = make_adapter_folder(
            tiny_llama(), folder / name, targets=SEVEN, invocation=tiny_chat().encode(text), seed=seed
        )
        shutil.copy(LIBRARY / name / "io.yaml", at / "io.yaml")
        ours = {"format": 1, "invocation_text": text, "reads": READS[name], "task": name}
        (at / "midstream.json").write_text(json.dumps(ours))
        made.append(at)
    return made


def make_short_intrinsics(folder: Path) -> list[Path]:
    """All six, with contracts that are the library's but for lengths.

    A token of the tiny tokenizer is a byte, and a random model does not end a string that it may go on with.
    """
    folders = make_intrinsics(folder)
    for each in folders:
        contract = yaml.safe_load((each / "io.yaml").read_text())
        contract["parameters"] = {"max_tokens": 98}
        if each.name == "query_rewrite":
            schema = json.loads(contract["response_format"])
            schema["properties"]["rewritten_question"]["maxLength"] = REWRITTEN_CHARACTERS
            contract["response_format"] = json.dumps(schema)
        (each / "io.yaml").write_text(yaml.safe_dump(contract))
    return folders


async def intrinsics_engine(folders: Sequence[Path], **config: Any) -> AsyncEngine:
    """An engine that has loaded them."""
    engine = tiny_engine(tiny_llama(), **config)
    for folder in folders:
        await engine.load_adapter(folder)
    return engine


async def check_idle(engine: AsyncEngine) -> None:
    """Nothing runs or waits, no KV is held, and the tree is whole."""
    stats = await engine.stats()
    assert (stats.running, stats.queued) == (0, 0)
    assert not [node for node in await engine.cache_nodes(limit=10_000) if node.held]
    await engine.check_integrity()
