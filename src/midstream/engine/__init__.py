"""The engine: continuous batching of base, LoRA and aLoRA rows over one shared KV cache."""

from midstream.engine.core import EngineStats
from midstream.engine.engine import AsyncEngine

__all__ = ["AsyncEngine", "EngineStats"]
