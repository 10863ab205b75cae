"""midstream: activated LoRA adapters that switch on mid-conversation and reuse the base model's KV cache."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from midstream.config import EngineConfig
from midstream.errors import MidstreamError
from midstream.types import (
    Chat,
    Choice,
    Completion,
    Document,
    JsonSchema,
    Message,
    Regex,
    Request,
    SamplingParams,
    Usage,
)

if TYPE_CHECKING:
    from midstream.engine.engine import AsyncEngine
    from midstream.remote import RemoteBackend
    from midstream.session import Conversation, Engine, Reply

__all__ = [
    "AsyncEngine",
    "Chat",
    "Choice",
    "Completion",
    "Conversation",
    "Document",
    "Engine",
    "EngineConfig",
    "JsonSchema",
    "Message",
    "MidstreamError",
    "Regex",
    "RemoteBackend",
    "Reply",
    "Request",
    "SamplingParams",
    "Usage",
]

# These take long to import (torch and transformers seconds); they come when they are first used.
_HEAVY = {
    "AsyncEngine": "midstream.engine.engine",
    "Conversation": "midstream.session",
    "Engine": "midstream.session",
    "RemoteBackend": "midstream.remote",
    "Reply": "midstream.session",
}


def __getattr__(name: str) -> Any:
    if name in _HEAVY:
        return getattr(import_module(_HEAVY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
