"""The adapter folders that a server is started with."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from midstream.config import ServerConfig
from midstream.errors import AdapterError
from midstream.intrinsics.spec import parse_contract
from midstream.library import library_adapters
from midstream.server.served import ServedEngine


def adapter_folders(config: ServerConfig, model_name: str) -> dict[str, Path]:
    """By adapter's name: the library's for the model, then those that were named, which go before.

    Raises AdapterError for a name that is the base model's, ContractError for a wrong contract.
    """
    folders = {folder.name: folder for folder in (library_adapters(model_name) if config.library else [])}
    folders |= dict(_named(text) for text in config.adapters)
    for name, folder in folders.items():
        check_folder(folder, name, base_names=(config.served_name or model_name, model_name))
    return folders


async def load_adapters(engine: ServedEngine, config: ServerConfig) -> None:
    """Load all of them into an engine."""
    folders = await asyncio.to_thread(adapter_folders, config, engine.model_name)
    for name, folder in folders.items():
        await engine.load_adapter(folder, name=name)


def check_folder(folder: Path, name: str, *, base_names: tuple[str, ...]) -> None:
    """Raises AdapterError for a name that is the base model's, ContractError for a wrong contract."""
    if name in base_names:
        raise AdapterError(f"{name} is the base model's name: choose another one")
    file = folder / "io.yaml"
    if file.is_file():
        parse_contract(file.read_text(encoding="utf-8", errors="replace"), str(file))


def _named(text: str) -> tuple[str, Path]:
    """NAME=FOLDER, or a folder whose own name is the adapter's."""
    name, sign, folder = text.partition("=")
    return (name, Path(folder)) if sign and os.sep not in name else (Path(text).absolute().name, Path(text))
