"""The base model's KV of training prefixes: computed once without gradients, kept, and reused over epochs and runs.

A prefix belongs to the base model alone, so no training step changes it. Entries are addressed by the model's weights
and the prefix's token ids, kept in memory within a budget and on disk within another, so that every later epoch, and
every later run on the same conversations whatever its task, rank or seed, finds them.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Cache, DynamicCache

from midstream.training.prefix_cache import prefix_cache

Prefix = Sequence[int]
# Tokens computed together, elsewhere and on a CPU, where larger batches gain nothing.
_BATCH_TOKENS = (16384, 512)
# A file still being written after an hour is that of a run that was killed.
_STALE_S = 3600


class BaseKV:
    """KV of prefixes: per entry [layers, 2, kv_heads, tokens, head_dim] in the model's own dtype, so nothing is lost.

    `memory_bytes` and `disk_bytes` bound what is kept; an entry that fits neither is computed again when needed.
    `computed_tokens` counts the tokens that went through the model. Each process minds the disk budget by what it saw
    when it began and has written since; two at once may pass it together.
    """

    def __init__(
        self, network: Any, *, memory_bytes: int = 4 * 1024**3, folder: Path | None = None, disk_bytes: int = 0
    ) -> None:
        self._network = network
        self.model_digest = model_digest(network)
        self._memory_bytes = memory_bytes
        self._folder = folder
        self._disk_bytes = disk_bytes
        self._kept: dict[str, Tensor] = {}
        self._kept_bytes = 0
        self._on_disk = _files(folder)
        # Entries that this run has asked for stay: taking them away for one another would help nobody.
        self._used: set[str] = set()
        self.computed_tokens = 0

    def prepare(self, prefixes: Iterable[Prefix], tick: Callable[[int], None] = lambda done: None) -> None:
        """Have the KV of all these prefixes, those of like length computed together; `tick` hears how many are done.

        The batches depend on the prefixes alone, so a run that starts again computes the very same bits.
        """
        order = sorted({tuple(prefix) for prefix in prefixes}, key=lambda p: (len(p), p))
        self._used |= {self._key(prefix) for prefix in order}
        for batch in _batches(order, _BATCH_TOKENS[self._network.device.type == "cpu"]):
            # All of them, even if some are there: a batch of other neighbours would give other bits.
            if any(self._find(self._key(prefix)) is None for prefix in batch):
                self._compute_and_keep(batch)
            tick(len(batch))

    def batch(self, prefixes: Sequence[Prefix]) -> tuple[Cache, Tensor]:
        """A cache for a batch of prefixes padded on the left, and its mask [batch, longest] (1 where real)."""
        found = {key: self._find(key) for key in map(self._key, prefixes)}
        missing = {key: prefix for prefix in prefixes if found[key := self._key(prefix)] is None}
        if missing:
            found.update(self._compute_and_keep(list(missing.values())))
        return self._assemble([_there(found[self._key(prefix)]) for prefix in prefixes])

    def _key(self, prefix: Prefix) -> str:
        return hashlib.sha256(f"{self.model_digest}|{','.join(map(str, prefix))}".encode()).hexdigest()

    def _find(self, key: str) -> Tensor | None:
        self._used.add(key)
        if key in self._kept:
            return self._kept[key]
        path = self._path(key)
        if path is None or not path.is_file():
            return None
        try:
            entry = load_file(path)["kv"]
            os.utime(path)  # just used: among the last to make way
        except (SafetensorError, OSError, KeyError):
            path.unlink(missing_ok=True)  # damaged, or just taken away: computed and written again
            return None
        self._remember(key, entry)
        return entry

    def _compute_and_keep(self, prefixes: Sequence[Prefix]) -> dict[str, Tensor]:
        """Compute a batch; an entry that is there already stays the one that counts."""
        fresh = dict(zip(map(self._key, prefixes), self._compute(prefixes), strict=True))
        for key in fresh:
            there = self._find(key)
            if there is not None:
                fresh[key] = there
                continue
            self._remember(key, fresh[key])
            self._write(key, fresh[key])
        return fresh

    def _remember(self, key: str, entry: Tensor) -> None:
        if key not in self._kept and self._kept_bytes + entry.nbytes <= self._memory_bytes:
            self._kept[key] = entry
            self._kept_bytes += entry.nbytes

    def _write(self, key: str, entry: Tensor) -> None:
        path = self._path(key)
        if path is None or not self._make_room(entry.nbytes):
            return
        part = path.with_suffix(f".{os.getpid()}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({"kv": entry.contiguous()}, part)
            part.rename(path)
        except (OSError, SafetensorError) as error:
            # The store only saves time: a full disk must not end a run.
            with suppress(OSError):
                part.unlink(missing_ok=True)
            self._disk_bytes = 0
            warnings.warn(f"no more KV is kept on disk: {error}", stacklevel=2)
            return
        self._on_disk[key] = entry.nbytes

    def _make_room(self, size: int) -> bool:
        """Whether an entry fits on disk, after the oldest of earlier runs have made way."""
        total = sum(self._on_disk.values())
        for key in [key for key in self._on_disk if key not in self._used]:
            if total + size <= self._disk_bytes:
                break
            total -= self._on_disk.pop(key)
            path = self._path(key)
            assert path is not None
            path.unlink(missing_ok=True)
        return total + size <= self._disk_bytes

    def _path(self, key: str) -> Path | None:
        return None if self._folder is None else self._folder / key[:2] / f"{key}.safetensors"

    @torch.no_grad()
    def _compute(self, prefixes: Sequence[Prefix]) -> list[Tensor]:
        longest = max(len(prefix) for prefix in prefixes)
        ids = torch.zeros(len(prefixes), longest, dtype=torch.long)
        mask = torch.zeros(len(prefixes), longest, dtype=torch.long)
        for i, prefix in enumerate(prefixes):
            ids[i, : len(prefix)] = torch.tensor(list(prefix))
            mask[i, : len(prefix)] = 1
            self.computed_tokens += len(prefix)
        # Without a config every layer keeps all positions, sliding windows too: the mask narrows them.
        cache = DynamicCache()
        device = self._network.device
        with _base_only(self._network):
            self._network.base_model(
                input_ids=ids.to(device), attention_mask=mask.to(device), cache=cache, use_cache=True
            )
        layers = torch.stack([torch.stack((layer.keys, layer.values)) for layer in cache.layers]).cpu()
        return [layers[:, :, i, :, : len(prefix)].clone() for i, prefix in enumerate(prefixes)]

    def _assemble(self, entries: list[Tensor]) -> tuple[Cache, Tensor]:
        longest = max(entry.shape[3] for entry in entries)
        first = entries[0]
        packed = first.new_zeros(first.shape[0], 2, len(entries), first.shape[2], longest, first.shape[4])
        mask = torch.zeros(len(entries), longest, dtype=torch.long)
        for i, entry in enumerate(entries):
            length = entry.shape[3]
            packed[:, :, i, :, longest - length :] = entry
            mask[i, longest - length :] = 1
        device = self._network.device
        return prefix_cache(packed.to(device)), mask.to(device)


@contextmanager
def _base_only(network: Any) -> Iterator[None]:
    """The base model as it is served: without adapters, dropout or gradient checkpointing."""
    layers = [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
    training = network.training
    network.eval()
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        network.train(training)


def _batches(order: Sequence[Prefix], tokens: int) -> Iterator[list[Prefix]]:
    """Neighbours in order, padded to the longest, within so many tokens; at least one."""
    batch: list[Prefix] = []
    for prefix in order:
        if batch and (len(batch) + 1) * len(prefix) > tokens:
            yield batch
            batch = []
        batch.append(prefix)
    if batch:
        yield batch


def model_digest(network: Any) -> str:
    """Content hash (hex) of a model's own configuration and weights, without any adapter's."""
    config = {k: v for k, v in network.config.to_dict().items() if not k.startswith("_")}
    content = hashlib.sha256(json.dumps([str(network.dtype), config], sort_keys=True, default=str).encode())
    for name, weight in sorted(network.named_parameters()):
        if "lora_" not in name:
            content.update(name.replace(".base_layer", "").encode())
            content.update(weight.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return content.hexdigest()


def _there(entry: Tensor | None) -> Tensor:
    assert entry is not None
    return entry


def _files(folder: Path | None) -> dict[str, int]:
    """Key and bytes of each entry on disk, the least recently used first."""
    if folder is None or not folder.is_dir():
        return {}
    for part in folder.glob("*/*.part"):
        if time.time() - part.stat().st_mtime > _STALE_S:
            part.unlink(missing_ok=True)
    found = sorted((path.stat().st_mtime, path.stem, path.stat().st_size) for path in folder.glob("*/*.safetensors"))
    return {key: size for _, key, size in found}
