"""What this package uses of midstream itself. Type checkers read the originals, which are the same."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from midstream.adapters.activation import activation_index
    from midstream.adapters.spec import CONFIG_FILE, AdapterSpec
    from midstream.adapters.weights import WEIGHTS_FILE, Adapter, load_adapter
    from midstream.errors import AdapterFormatError, InputError, InvocationError, MidstreamError
else:
    from midstream_vllm._midstream.activation import activation_index
    from midstream_vllm._midstream.errors import AdapterFormatError, InputError, InvocationError, MidstreamError
    from midstream_vllm._midstream.spec import CONFIG_FILE, AdapterSpec
    from midstream_vllm._midstream.weights import WEIGHTS_FILE, Adapter, load_adapter

__all__ = [
    "CONFIG_FILE",
    "WEIGHTS_FILE",
    "Adapter",
    "AdapterFormatError",
    "AdapterSpec",
    "InputError",
    "InvocationError",
    "MidstreamError",
    "activation_index",
    "load_adapter",
]
