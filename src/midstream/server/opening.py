"""From the settings to what the server stands in front of."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import shlex
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import httpx
from rich.console import Console

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
from midstream.server.vllm.command import Launch
from midstream.server.vllm.environment import find_environment
from midstream.server.vllm.process import ChildServer
from midstream.types import AdapterInfo

log = logging.getLogger("midstream.server")


@dataclass(frozen=True, slots=True)
class Opened:
    """An engine to serve, not yet entered. `child`: a process that was started for it, and ends with it."""

    engine: ServedEngine
    child: ChildServer | None = None


def open_engine(config: ServerConfig, *, progress: bool = False) -> Opened:
    """The engine of the settings. Raises what it raises when it cannot be loaded."""
    if config.backend is None:
        return Opened(_embedded(config, progress))
    if config.backend == "vllm":
        return _vllm(config, progress)
    key = None if config.backend_key is None else config.backend_key.get_secret_value()
    return Opened(_remote(config, _read_model(config, progress, weights=False), config.backend, key))


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


@dataclass(frozen=True, slots=True)
class _Model:
    """What is read here of a model that is computed elsewhere."""

    name: str
    folder: Path
    chat: ChatTokenizer
    adapters: list[AdapterInfo]


def _read_model(config: ServerConfig, progress: bool, *, weights: bool) -> _Model:
    folder, name = resolve(config.model, progress=progress, weights=weights), name_of(config.model)
    chat = ChatTokenizer.from_folder(folder)
    folders = adapter_folders(config, name)
    infos = [read_folder(path, name=adapter, encode=chat.encode) for adapter, path in folders.items()]
    return _Model(name, folder, chat, infos)


def _remote(
    config: ServerConfig,
    model: _Model,
    url: str,
    key: str | None,
    closing: Callable[[], Awaitable[None]] | None = None,
    transport: httpx.AsyncBaseTransport | None = None,
) -> RemoteEngine:
    tokens = LocalTokens(model.chat)
    backend = RemoteBackend(
        url, api_key=key, adapters=model.adapters, tokens=tokens, look_up=False, transport=transport
    )
    return RemoteEngine(
        backend, model.chat, model_name=model.name, vocab_size=_vocab_size(model.folder, model.chat), closing=closing
    )


def _vllm(config: ServerConfig, progress: bool) -> Opened:
    environment = find_environment(config.vllm_python)
    model = _read_model(config, progress, weights=True)
    launch = Launch(environment, model.folder, model.name, model.adapters, _free_port(), secrets.token_urlsafe(32))
    command = launch.command(config)
    log.info("starting vLLM %s: %s", environment.version, shlex.join(command))
    child = ChildServer(command, launch.variables(config, os.environ))
    try:
        # Where the log goes to a file, nothing else would show that something happens.
        shown = progress and config.log_file is not None
        with Console(stderr=True, quiet=not shown).status("starting vLLM"):
            child.wait_ready(launch.url)
        # Of its own: whatever proxy the environment names is not for what runs on this machine.
        transport = httpx.AsyncHTTPTransport(limits=httpx.Limits(max_connections=None, max_keepalive_connections=64))
        return Opened(_remote(config, model, launch.url, launch.key, child.aclose, transport), child)
    except BaseException:
        child.close()
        raise


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _vocab_size(folder: Path, chat: ChatTokenizer) -> int:
    """The model's, which may have room for more tokens than the tokenizer knows."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    found = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    return found if isinstance(found, int) else len(chat.tokenizer)
