"""Who runs the race: the embedded engine, and vLLM's OpenAI server with the plugin, each with two kinds of adapters.

An engine is loaded once and has all adapters of both kinds, so that its two sides differ in nothing but in which ones
their calls name. Both keep whatever KV the budget holds, the plain LoRAs' own prefixes too.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.peers_build import VLLM, Builder
from benchmarks.peers_process import WorkerError
from benchmarks.peers_protocol import Label
from benchmarks.peers_work import make_label
from benchmarks.turn_script import Call, Script
from benchmarks.turn_sides import Answer, EngineSide, Side
from benchmarks.vllm_plugin import plugin_environment
from midstream.config import EngineConfig, ServerConfig
from midstream.models.chat import ChatTokenizer
from midstream.remote.folders import read_folder
from midstream.server.vllm.command import Launch
from midstream.server.vllm.environment import VllmEnvironment
from midstream.server.vllm.process import ChildServer
from midstream.session import Engine

KINDS = ("alora", "lora")
_BASE = "base"
_SILENCE_S = 1800.0  # a call may wait behind long prefills of many others


@dataclass(frozen=True, slots=True)
class Field:
    """What is raced with. `folders`: of each kind, the adapters' PEFT folders by the intrinsic's name.

    `kv_mib` is the memory for KV, the same on every side. `scratch` is a folder to write to.
    """

    model: Path
    chat: ChatTokenizer
    folders: Mapping[str, Mapping[str, Path]]
    scripts: Sequence[Script]
    dtype: str
    kv_mib: int
    builder: Builder
    scratch: Path


Sides = Mapping[str, Side]
"""An engine's two sides, by the kind of their adapters."""


class ServedSide:
    """An OpenAI server. `models`: under which names it serves the intrinsics' adapters.

    A label is one decoded token behind those that all its options begin with, as on the embedded engine: structured
    outputs would have vLLM decode all of its tokens one by one.
    """

    def __init__(
        self,
        name: str,
        client: httpx.AsyncClient,
        models: Mapping[str, str],
        label: Callable[[Sequence[str]], Label | None],
    ) -> None:
        self.name = name
        self._client = client
        self._models = models
        self._label = label

    async def fresh(self) -> None:
        """Raises WorkerError where the server goes on holding KV."""
        if not (await self._post("reset_prefix_cache", {})).get("success"):
            raise WorkerError(f"{self.name} did not forget its prefixes")

    async def run(self, call: Call) -> Answer:
        label = self._label(call.options)
        opening = label.opening if label else ()
        body = {
            "model": _BASE if call.adapter is None else self._models[call.adapter],
            "prompt": [*call.prompt, *opening],
            "max_tokens": 1 if label else call.tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "return_token_ids": True,
            **({"allowed_token_ids": list(label.parting)} if label else {}),
        }
        reply = await self._post("v1/completions", body)
        usage = reply["usage"]
        cached = (usage["prompt_tokens_details"] or {}).get("cached_tokens") or 0
        # The opening is part of the answer, as it is where an engine appends it.
        return Answer(tuple(reply["choices"][0]["token_ids"]), usage["prompt_tokens"] - len(opening) - cached)

    async def kv_bytes(self) -> int:
        return 0  # the server does not tell

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        try:
            response = await self._client.post(path, json=body)
        except httpx.HTTPError as error:
            raise WorkerError(f"{self.name}, {path}: {type(error).__name__} {error}") from error
        if not response.is_success:
            raise WorkerError(f"{self.name}, {path}: {response.status_code} {response.text[:300]}")
        found: dict[str, Any] = response.json()
        return found


@contextmanager
def embedded(field: Field, _: asyncio.Runner) -> Iterator[Sides]:
    """The embedded engine's sides."""
    config = EngineConfig(kv_budget_bytes=field.kv_mib * 1024**2)
    with Engine.load(field.model, config=config, dtype=field.dtype, wait_for_kernels=True) as engine:
        yield {kind: EngineSide(f"embedded-{kind}", engine, _load(engine, field, kind), "all") for kind in KINDS}


def _load(engine: Engine, field: Field, kind: str) -> dict[str, str]:
    folders = field.folders[kind].items()
    return {name: engine.load_adapter(folder, name=_served_name(name, kind)).name for name, folder in folders}


@contextmanager
def served(field: Field, runner: asyncio.Runner) -> Iterator[Sides]:
    """The sides of one vLLM server. Raises Absent, or BackendError where it does not start."""
    launch, config = make_launch(field)
    # Without its development mode vLLM has no way to be told to forget its prefixes.
    apart = {"HF_HUB_OFFLINE": "1", "VLLM_SERVER_DEV_MODE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    outer = {**os.environ, **plugin_environment(field.scratch), **apart}
    server = ChildServer(launch.command(config), launch.variables(config, outer))
    try:
        server.wait_ready(launch.url)
        headers = {"authorization": f"Bearer {launch.key}"}
        client = httpx.AsyncClient(base_url=launch.url, headers=headers, timeout=_SILENCE_S, trust_env=False)
        try:
            yield {kind: ServedSide(f"vllm-{kind}", client, _names(field, kind), labels(field.chat)) for kind in KINDS}
        finally:
            runner.run(client.aclose())
    finally:
        server.close()


def make_launch(field: Field) -> tuple[Launch, ServerConfig]:
    """vLLM as `midstream serve --backend vllm` starts it, with all adapters of both kinds. Raises Absent."""
    environment = VllmEnvironment(field.builder.vllm_python(), VLLM, cpu=True)
    adapters = [
        read_folder(folder, name=_served_name(name, kind))
        for kind in KINDS
        for name, folder in field.folders[kind].items()
    ]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = Launch(environment, field.model, _BASE, adapters, port, secrets.token_hex(16))
    return launch, ServerConfig(backend="vllm", dtype=field.dtype, kv_mib=field.kv_mib)


def _names(field: Field, kind: str) -> dict[str, str]:
    return {name: _served_name(name, kind) for name in field.folders[kind]}


def _served_name(intrinsic: str, kind: str) -> str:
    return f"{intrinsic}-{kind}"


def labels(chat: ChatTokenizer) -> Callable[[Sequence[str]], Label | None]:
    """The label with these options, each made once; None where there are none."""
    known: dict[tuple[str, ...], Label | None] = {}

    def label(options: Sequence[str]) -> Label | None:
        key = tuple(options)
        if key not in known:
            known[key] = make_label(chat, key)
        return known[key]

    return label
