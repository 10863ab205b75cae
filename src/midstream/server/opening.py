"""From the settings to what the server stands in front of."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from midstream.config import ServerConfig
from midstream.engine.engine import AsyncEngine
from midstream.models.chat import ChatTokenizer
from midstream.models.source import name_of, resolve
from midstream.remote import RemoteBackend
from midstream.remote.folders import read_folder
from midstream.server.folders import adapter_folders, load_adapters
from midstream.server.local_tokens import LocalTokens
from midstream.server.remote_engine import RemoteEngine
from midstream.server.served import ServedEngine


@dataclass(frozen=True, slots=True)
class Opened:
    """An engine to serve, not yet entered."""

    engine: ServedEngine


def open_engine(config: ServerConfig, *, progress: bool = False) -> Opened:
    """The engine of the settings. Raises what it raises when it cannot be loaded."""
    if config.backend is None:
        return Opened(_embedded(config, progress))
    return Opened(_remote(config, progress))


def _embedded(config: ServerConfig, progress: bool) -> ServedEngine:
    engine = AsyncEngine.load(
        config.model,
        config=config.engine(),
        dtype=config.dtype,
        device=config.device,
        weights=config.weights,
        progress=progress,
    )
    try:
        asyncio.run(load_adapters(engine, config))
    except BaseException:
        asyncio.run(engine.aclose())
        raise
    return engine


def _remote(config: ServerConfig, progress: bool) -> ServedEngine:
    assert config.backend is not None
    folder = resolve(config.model, progress=progress, weights=False)
    key = None if config.backend_key is None else config.backend_key.get_secret_value()
    return remote_engine(config, folder, adapter_folders(config, name_of(config.model)), config.backend, key)


def remote_engine(
    config: ServerConfig, folder: Path, adapters: Mapping[str, Path], url: str, key: str | None
) -> RemoteEngine:
    """The server at `url` with the tokenizer of the model in `folder`, and adapters as their folders describe them."""
    chat = ChatTokenizer.from_folder(folder)
    infos = [read_folder(path, name=name, encode=chat.encode) for name, path in adapters.items()]
    backend = RemoteBackend(url, api_key=key, adapters=infos, tokens=LocalTokens(chat), look_up=False)
    return RemoteEngine(backend, chat, model_name=name_of(config.model), vocab_size=_vocab_size(folder, chat))


def _vocab_size(folder: Path, chat: ChatTokenizer) -> int:
    """The model's, which may have room for more tokens than the tokenizer knows."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    found = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    return found if isinstance(found, int) else len(chat.tokenizer)
