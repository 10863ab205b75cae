"""Adapters in the formats of the peers: plain LoRA folders, and GGUF files for llama.cpp."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from safetensors import deserialize

# Of a llama-like model: the module's name in transformers, and the tensor's in GGUF.
_TENSORS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_NUMPY = {"F32": np.float32, "F16": np.float16}
_KEY = re.compile(r"\.layers\.(\d+)\.(.+)\.lora_(A|B)\.weight$")


class ExportError(Exception):
    """An adapter that a peer's format cannot hold."""


def activated_late(invocation: list[int]) -> list[int]:
    """The invocation tokens with which llama.cpp activates an adapter where PEFT does.

    llama.cpp activates one token before the tokens it looks for, so it must look for them from the second one on.
    """
    if len(invocation) < 2:
        raise ExportError("llama.cpp activates one token early, and an invocation of one token leaves none to look for")
    return invocation[1:]


def write_gguf(folder: Path, target: Path, base: Path) -> Path:
    """Write a PEFT folder of a llama-like base model (its Hugging Face folder) as a GGUF adapter in float32."""
    config = json.loads((folder / "adapter_config.json").read_text())
    shape = json.loads((base / "config.json").read_text())
    _refuse(config, shape)
    writer = gguf.GGUFWriter(target, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(config["lora_alpha"]))
    if invocation := config.get("alora_invocation_tokens"):
        # llama.cpp reads unsigned integers and no others.
        key = gguf.Keys.Adapter.ALORA_INVOCATION_TOKENS
        writer.add_key_value(
            key, activated_late(invocation), gguf.GGUFValueType.ARRAY, sub_type=gguf.GGUFValueType.UINT32
        )
    for name, weight in _tensors(_read(folder / "adapter_model.safetensors"), shape):
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def _refuse(config: Mapping[str, Any], shape: Mapping[str, Any]) -> None:
    """Whatever would make the file mean another adapter."""
    if shape.get("model_type") != "llama":
        raise ExportError(f"only adapters of llama-like models are written, this is {shape.get('model_type')!r}")
    for name in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern"):
        if config.get(name):
            raise ExportError(f"{name}={config[name]!r} has no place in a GGUF adapter")


def _read(path: Path) -> dict[str, NDArray[np.float32]]:
    """A safetensors file in float32, without torch: numpy knows no bfloat16, the upper half of a float32."""
    found: dict[str, NDArray[np.float32]] = {}
    for name, tensor in deserialize(path.read_bytes()):
        if tensor["dtype"] == "BF16":
            values = (np.frombuffer(tensor["data"], np.uint16).astype(np.uint32) << 16).view(np.float32)
        elif tensor["dtype"] in _NUMPY:
            values = np.frombuffer(tensor["data"], _NUMPY[tensor["dtype"]]).astype(np.float32)
        else:
            raise ExportError(f"{name} is of type {tensor['dtype']}")
        found[name] = values.reshape(tensor["shape"])
    return found


def _tensors(
    weights: Mapping[str, NDArray[np.float32]], shape: Mapping[str, Any]
) -> list[tuple[str, NDArray[np.float32]]]:
    heads = shape["num_attention_heads"]
    rotated = {"self_attn.q_proj": heads, "self_attn.k_proj": shape.get("num_key_value_heads") or heads}
    found: list[tuple[str, NDArray[np.float32]]] = []
    for key, weight in sorted(weights.items()):
        match = _KEY.search(key)
        if match is None or match[2] not in _TENSORS:
            raise ExportError(f"{key} is no layer that a GGUF adapter of this architecture has")
        layer, module, side = match.groups()
        if side == "B" and module in rotated:
            weight = _interleaved(weight, rotated[module])
        found.append((f"blk.{layer}.{_TENSORS[module]}.weight.lora_{side.lower()}", weight))
    return found


def _interleaved(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows in GGUF's order: transformers rotates a head's first half with its second, GGUF each row with the next."""
    rows = np.arange(len(weight)).reshape(heads, 2, -1)
    return np.ascontiguousarray(weight[rows.transpose(0, 2, 1).reshape(-1)])
