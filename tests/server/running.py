"""A server over a tiny model with a family of adapters, really listening, in a thread of the tests' process."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from midstream.config import ServerConfig
from midstream.engine.engine import AsyncEngine
from midstream.remote import RemoteBackend
from midstream.server.app import create_app
from midstream.server.local_tokens import LocalTokens
from midstream.server.remote_engine import RemoteEngine
from midstream.server.run import GracefulServer
from midstream.server.served import ServedEngine
from midstream.server.service import Service
from tests.helpers import make_adapter_folder, tiny_llama
from tests.tiny import VOCAB, tiny_chat, tiny_engine

# name → (label or schema, what it reads, instruction); all answer what a random model answers.
ADAPTERS: dict[str, tuple[dict[str, Any], str, str | None]] = {
    "jailbreak": ({"type": "string", "enum": ["yes", "no"]}, "user", None),
    "answerability": ({"type": "string", "enum": ["answerable", "unanswerable"]}, "user", None),
    "certainty": ({"type": "integer", "enum": [0, 1, 2]}, "assistant", None),
    "requirement_check": ({"type": "string", "enum": ["met", "not_met"]}, "assistant", "Requirement: {requirement}"),
}


def write_adapters(root: Path) -> dict[str, Path]:
    """Random aLoRA folders with contracts, and a plain LoRA named `twin`."""
    model = tiny_llama()
    folders: dict[str, Path] = {}
    for seed, (name, (schema, reads, instruction)) in enumerate(ADAPTERS.items()):
        text = f"<|im_start|>{name}\n"
        folder = make_adapter_folder(model, root / name, seed=seed, invocation=tiny_chat().encode(text))
        sidecar = {"format": 1, "invocation_text": text, "reads": reads, "task": name}
        (folder / "midstream.json").write_text(json.dumps(sidecar))
        contract = {
            "model": None,
            "response_format": json.dumps(schema),
            "transformations": None,
            "instruction": instruction,
            "parameters": {"max_tokens": 40},
        }
        (folder / "io.yaml").write_text(json.dumps(contract))
        folders[name] = folder
    folders["twin"] = make_adapter_folder(model, root / "twin", seed=9)
    return folders


def make_engine(root: Path, **config: Any) -> AsyncEngine:
    """A tiny engine with all adapters of `write_adapters` loaded."""
    engine = tiny_engine(tiny_llama(), **config)

    async def load() -> None:
        for name, folder in write_adapters(root).items():
            await engine.load_adapter(folder, name=name)

    asyncio.run(load())
    return engine


@dataclass
class Running:
    """A listening server. `client` speaks to it; `service` is its inside, `engine` what computes at the bottom of it:
    its own, or that of the server it stands in front of."""

    url: str
    client: httpx.Client
    service: Service
    server: uvicorn.Server
    engine: AsyncEngine

    def run(self, coroutine: Any) -> Any:
        """Run a coroutine of the engine from the test's thread."""
        return asyncio.run(coroutine)


@contextmanager
def running(engine: ServedEngine, *, bottom: AsyncEngine | None = None, **settings: Any) -> Iterator[Running]:
    """Serve an engine on a free port until the block ends; then no KV may be held."""
    if bottom is None:
        assert isinstance(engine, AsyncEngine)
        bottom = engine
    app = create_app(engine, ServerConfig(library=False, port=0, **settings))
    service = app.state.service
    config = uvicorn.Config(app, port=0, log_config=None, access_log=False, timeout_graceful_shutdown=10)
    server = GracefulServer(config, service)
    thread = threading.Thread(target=lambda: asyncio.run(_entered(engine, server)), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
    port = server.servers[0].sockets[0].getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    headers = {"Authorization": f"Bearer {settings['api_keys'][0]}"} if settings.get("api_keys") else {}
    try:
        with httpx.Client(base_url=url, headers=headers, timeout=60) as client:
            yield Running(url, client, service, server, bottom)
            if bottom.running:
                asyncio.run(settled(bottom))
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


async def _entered(engine: ServedEngine, server: uvicorn.Server) -> None:
    async with engine:
        await server.serve()


def front_of(url: str, **options: Any) -> RemoteEngine:
    """What a server in front of another one over the tiny model stands on."""
    backend = RemoteBackend(url, tokens=LocalTokens(tiny_chat()), look_up=False, **options)
    return RemoteEngine(backend, tiny_chat(), model_name="tiny", vocab_size=VOCAB)


async def settled(engine: AsyncEngine, seconds: float = 5.0) -> None:
    """Wait until nothing runs, and check that the engine's state is whole."""
    for _ in range(int(100 * seconds)):
        stats = await engine.stats()
        if not stats.running and not stats.queued:
            break
        await asyncio.sleep(0.01)
    else:
        raise AssertionError("requests are still running")
    await engine.check_integrity()
