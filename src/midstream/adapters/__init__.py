"""Adapters: PEFT folders checked, loaded, and kept."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from midstream.adapters.activation import activation_index, find_last
from midstream.adapters.registry import AdapterRegistry
from midstream.adapters.spec import AdapterSpec, parse_config
from midstream.adapters.targets import TargetSpec

if TYPE_CHECKING:
    from midstream.adapters.weights import Adapter, LoraWeights, load_adapter

__all__ = [
    "Adapter",
    "AdapterRegistry",
    "AdapterSpec",
    "LoraWeights",
    "TargetSpec",
    "activation_index",
    "find_last",
    "load_adapter",
    "parse_config",
]

# Weights need torch, which a caller of a server may not have loaded.
_HEAVY = frozenset({"Adapter", "LoraWeights", "load_adapter"})


def __getattr__(name: str) -> Any:
    if name in _HEAVY:
        return getattr(import_module("midstream.adapters.weights"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
