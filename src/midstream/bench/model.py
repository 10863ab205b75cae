"""What a model's decode step must read, and what its adapters can be attached to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from midstream.models.pool import KVPool
from midstream.session import Engine


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """A loaded model in figures.

    `linear_shapes`: (out, in) of each adaptable layer by module path. `weight_bytes`: of those layers and the output
    head, which a decode step reads whole; of the embedding it reads a row. `windows`: the most tokens that each layer
    attends to, None where there is no limit; `layer_bytes`: of one token's KV in each layer.
    """

    name: str
    dtype: torch.dtype
    weights: str
    kv: str
    device: torch.device
    linear_shapes: Mapping[str, tuple[int, int]]
    weight_bytes: int
    layer_bytes: Sequence[int]
    windows: Sequence[int | None]

    @classmethod
    def of(cls, engine: Engine) -> ModelFacts:
        loaded, kv_dtype = engine.aio._loaded, engine.aio._kv_dtype
        config: Any = getattr(loaded.model, "config", None)
        config = config.get_text_config()
        linear = sum(rows * columns for rows, columns in loaded.linear_shapes.values())
        head = loaded.vocab_size * int(config.hidden_size)
        return cls(
            name=loaded.name,
            dtype=loaded.dtype,
            weights=loaded.weights or str(loaded.dtype).removeprefix("torch."),
            kv=kv_dtype or str(loaded.dtype).removeprefix("torch."),
            device=loaded.device,
            linear_shapes=loaded.linear_shapes,
            weight_bytes=(linear + head) * (1 if loaded.weights == "int8" else loaded.dtype.itemsize),
            layer_bytes=[KVPool.bytes_per_slot([shape], loaded.dtype, kv_dtype) for shape in loaded.kv_shapes],
            windows=_windows(config, len(loaded.kv_shapes)),
        )

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's KV."""
        return sum(self.layer_bytes)

    def step_bytes(self, tokens: int) -> int:
        """Bytes that a decode step behind so many tokens reads: weights and KV, once each."""
        kv = sum(
            size * (tokens if window is None else min(tokens, window))
            for size, window in zip(self.layer_bytes, self.windows, strict=True)
        )
        return self.weight_bytes + kv


def _windows(config: Any, layers: int) -> list[int | None]:
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * layers
    return [window if kind == "sliding_attention" else None for kind in kinds]
