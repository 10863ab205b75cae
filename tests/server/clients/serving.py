"""Adapters with the contracts that a client expects, as folders."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from midstream.engine.engine import AsyncEngine
from midstream.library import library_folder
from midstream.models.source import DEFAULT_MODEL
from tests.helpers import make_adapter_folder, tiny_llama
from tests.tiny import tiny_chat

LIBRARY = library_folder(DEFAULT_MODEL) or Path("missing")

# Mellea's name for an adapter → the one of the library that does it, and what Mellea makes of its answer.
SWITCH: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "answerability": ("answerability", [{"type": "nest", "input_path": [], "field_name": "answerability"}]),
    "requirement-check": (
        "requirement_check",
        [
            {"type": "likelihood", "input_path": [], "categories_to_values": {"met": 1.0, "not_met": 0.0}},
            {"type": "nest", "input_path": [], "field_name": "score"},
            {"type": "nest", "input_path": [], "field_name": "requirement_check"},
        ],
    ),
    "uncertainty": (
        "certainty",
        [
            {
                "type": "likelihood",
                "input_path": [],
                "categories_to_values": {step: 0.05 + 0.1 * step for step in range(10)},
            },
            {"type": "nest", "input_path": [], "field_name": "certainty"},
        ],
    ),
    "query_rewrite": ("query_rewrite", []),
}


def write_contract(folder: Path, response_format: Any, **more: Any) -> None:
    contract = {"model": None, "response_format": json.dumps(response_format), "transformations": None, **more}
    (folder / "io.yaml").write_text(yaml.safe_dump(contract, sort_keys=False), encoding="utf-8")


def tiny_adapter(root: Path, name: str, *, seed: int, response_format: Any, **contract: Any) -> Path:
    """The folder of a random aLoRA of the tiny model, with this contract."""
    text = f"<|im_start|>{name}\n"
    folder = make_adapter_folder(tiny_llama(), root / name, seed=seed, invocation=tiny_chat().encode(text))
    (folder / "midstream.json").write_text(json.dumps({"format": 1, "invocation_text": text, "task": name}))
    write_contract(folder, response_format, **contract)
    return folder


def write_switch(root: Path) -> Path:
    """`adapter_index.json` and the adapters of SWITCH: the server loads these very folders."""
    for name, (task, transformations) in SWITCH.items():
        folder = root / "io_configs" / name
        folder.mkdir(parents=True)
        for file in ("adapter_config.json", "adapter_model.safetensors", "midstream.json"):
            shutil.copy(LIBRARY / task / file, folder)
        contract = yaml.safe_load((LIBRARY / task / "io.yaml").read_text(encoding="utf-8"))
        contract["transformations"] = transformations
        (folder / "io.yaml").write_text(yaml.safe_dump(contract, sort_keys=False), encoding="utf-8")
    entries = [
        {"adapter_name": name, "technology": "alora", "io_config": f"io_configs/{name}/io.yaml"} for name in SWITCH
    ]
    (root / "adapter_index.json").write_text(json.dumps({"adapters": entries}))
    return root


def load_adapters(engine: AsyncEngine, folders: Mapping[str, Path]) -> None:
    async def load() -> None:
        for name, folder in folders.items():
            await engine.load_adapter(folder, name=name)

    asyncio.run(load())
