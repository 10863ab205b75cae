"""From the settings to what the server stands in front of."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from midstream.config import ServerConfig
from midstream.server.folders import load_adapters
from midstream.server.served import ServedEngine


@dataclass(frozen=True, slots=True)
class Opened:
    """An engine to serve, not yet entered."""

    engine: ServedEngine


def open_engine(config: ServerConfig, *, progress: bool = False) -> Opened:
    """The engine of the settings. Raises what it raises when it cannot be loaded."""
    return Opened(_embedded(config, progress))


def _embedded(config: ServerConfig, progress: bool) -> ServedEngine:
    # torch takes seconds to import, and a server in front of another one needs none of it.
    from midstream.engine.engine import AsyncEngine

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
