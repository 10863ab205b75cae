"""The base model's KV of training prefixes: computed once without gradients, kept, and reused over epochs and runs.

A prefix belongs to the base model alone, so no training step changes it. Entries are addressed by the prefix's
token ids and the model, kept in memory within a budget, and beyond it on disk.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DynamicCache


class BaseKV:
    """KV of prefixes: per entry [layers, 2, kv_heads, tokens, head_dim] in `dtype`.

    `memory_bytes` and `disk_bytes` bound what is kept; an entry that fits neither is computed again when needed.
    """

    def __init__(
        self,
        model: Any,
        *,
        model_key: str,
        dtype: torch.dtype = torch.bfloat16,
        memory_bytes: int = 8 * 1024**3,
        folder: Path | None = None,
        disk_bytes: int = 0,
    ) -> None:
        self._model = model
        self._model_key = model_key
        self._dtype = dtype
        self._memory_bytes = memory_bytes
        self._folder = folder
        self._disk_bytes = disk_bytes
        self._kept: OrderedDict[str, Tensor] = OrderedDict()
        self._kept_bytes = 0
        self._on_disk_bytes = _folder_bytes(folder)
        self.computed_tokens = 0

    def batch(self, prefixes: Sequence[Sequence[int]]) -> tuple[DynamicCache, Tensor]:
        """A cache for a batch of prefixes padded on the left, and its mask [batch, longest] (1 where real)."""
        missing = {self._key(prefix): prefix for prefix in prefixes if self._find(prefix) is None}
        fresh = dict(zip(missing, self._compute(list(missing.values())), strict=True)) if missing else {}
        entries: list[Tensor] = []
        for prefix in prefixes:
            entry = fresh.get(self._key(prefix))
            entries.append(entry if entry is not None else self._require(prefix))
        for key, entry in fresh.items():
            self._keep(key, entry)
        return self._assemble(entries)

    def _key(self, prefix: Sequence[int]) -> str:
        content = f"{self._model_key}|{self._dtype}|{','.join(map(str, prefix))}"
        return hashlib.sha256(content.encode()).hexdigest()

    def _find(self, prefix: Sequence[int]) -> Tensor | None:
        key = self._key(prefix)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        path = self._path(key)
        return load_file(path)["kv"] if path is not None and path.is_file() else None

    def _require(self, prefix: Sequence[int]) -> Tensor:
        found = self._find(prefix)
        return found if found is not None else self._compute([prefix])[0]

    def _keep(self, key: str, entry: Tensor) -> None:
        size = entry.nbytes
        if self._kept_bytes + size <= self._memory_bytes:
            self._kept[key] = entry
            self._kept_bytes += size
            return
        path = self._path(key)
        if path is not None and self._on_disk_bytes + size <= self._disk_bytes:
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            save_file({"kv": entry.contiguous()}, part)
            part.rename(path)
            self._on_disk_bytes += size

    def _path(self, key: str) -> Path | None:
        return None if self._folder is None else self._folder / f"{key}.safetensors"

    @torch.no_grad()
    def _compute(self, prefixes: list[Sequence[int]]) -> list[Tensor]:
        longest = max(len(prefix) for prefix in prefixes)
        ids = torch.zeros(len(prefixes), longest, dtype=torch.long)
        mask = torch.zeros(len(prefixes), longest, dtype=torch.long)
        for i, prefix in enumerate(prefixes):
            ids[i, : len(prefix)] = torch.tensor(list(prefix))
            mask[i, : len(prefix)] = 1
            self.computed_tokens += len(prefix)
        cache = DynamicCache(config=self._model.config)
        device = self._model.device
        with _base_only(self._model):
            self._model.model(input_ids=ids.to(device), attention_mask=mask.to(device), cache=cache, use_cache=True)
        layers = torch.stack([torch.stack((layer.keys, layer.values)) for layer in cache.layers])
        return [
            layers[:, :, i, :, : len(prefix)].to(device="cpu", dtype=self._dtype, copy=True)
            for i, prefix in enumerate(prefixes)
        ]

    def _assemble(self, entries: list[Tensor]) -> tuple[DynamicCache, Tensor]:
        longest = max(entry.shape[3] for entry in entries)
        device, dtype = self._model.device, self._model.dtype
        first = entries[0]
        shape = (first.shape[0], 2, len(entries), first.shape[2], longest, first.shape[4])
        packed = torch.zeros(shape, dtype=dtype)
        mask = torch.zeros(len(entries), longest, dtype=torch.long)
        for i, entry in enumerate(entries):
            length = entry.shape[3]
            packed[:, :, i, :, longest - length :] = entry
            mask[i, longest - length :] = 1
        packed = packed.to(device)
        cache = DynamicCache(config=self._model.config)
        for layer in range(packed.shape[0]):
            cache.update(packed[layer, 0], packed[layer, 1], layer)
        return cache, mask.to(device)


@contextmanager
def _base_only(model: Any) -> Iterator[None]:
    """Switch off every PEFT layer of a model for a while."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def _folder_bytes(folder: Path | None) -> int:
    if folder is None or not folder.is_dir():
        return 0
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
