"""Adapters: PEFT folders checked, loaded, and kept."""

from midstream.adapters.activation import activation_index, find_last
from midstream.adapters.registry import AdapterRegistry
from midstream.adapters.spec import AdapterSpec, parse_config
from midstream.adapters.targets import TargetSpec
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
