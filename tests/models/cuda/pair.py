"""One model with two pools: steps of both kinds of forward side by side."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from midstream.adapters.weights import load_adapter
from midstream.models.attention_plan import Range, RowSegment
from midstream.models.cuda.graphs import GraphForward
from midstream.models.deltas import DeltaGroup
from midstream.models.forward import Batch, EagerForward
from midstream.models.linear import linear_shapes
from midstream.models.load import LoadedModel, prepare
from midstream.models.pool import KVPool
from tests.helpers import SEVEN, make_adapter_folder
from tests.tiny import tiny_chat

SLOTS = 400
PREFIX = 60


class Pair:
    """One model with two pools of the same content: one whose small steps are replayed, one that calls the model."""

    def __init__(self, model: Any, kernels: Any, recorder: Any, device: str = "cpu") -> None:
        self.loaded: LoadedModel = prepare(copy.deepcopy(model).to(device), tiny_chat(), name="tiny", kernels=kernels)
        self.recorder = recorder
        self.pools = [
            KVPool(self.loaded.kv_shapes, SLOTS, self.loaded.dtype, self.loaded.device, spare=1) for _ in range(2)
        ]
        for pool in self.pools:
            for numbers in (each for kv in pool.layers for each in (kv.keys, kv.values)):
                numbers.fill_(7.0)
        self.replayed = GraphForward(self.loaded, self.pools[0], recorder)
        self.eager = EagerForward(self.loaded, self.pools[1])
        self.both(batch(PREFIX + 10, 0, 0, wanted=[]))

    @torch.inference_mode()
    def both(self, step: Batch) -> Tensor:
        """Logits of both, which agree, as do the pools but for the spare slot."""
        found, expected = self.replayed.run(step), self.eager.run(step)
        wanted = len(step.wanted)
        torch.testing.assert_close(found[:wanted], expected[:wanted], rtol=1e-4, atol=1e-4)
        for ours, theirs in zip(*([kv.keys for kv in pool.layers] for pool in self.pools), strict=True):
            torch.testing.assert_close(ours[:, :SLOTS], theirs[:, :SLOTS], rtol=1e-4, atol=1e-4)
        return found[:wanted]


def batch(
    count: int, row_slot: int, position: int, *, wanted: list[int] | None = None, seen: tuple[Range, ...] = ()
) -> Batch:
    """One segment of `count` rows."""
    tokens = [(13 * (position + i) + 5) % 300 for i in range(count)]
    segment = RowSegment(0, count, position, row_slot, seen)
    return Batch(tokens, list(range(position, position + count)), (segment,), (), wanted or [])


def decodes(rows: int, *groups: tuple[str, Any, int, int], shift: int = 0) -> Batch:
    """Rows that each see the prefix and themselves; some of them are adapters'."""
    segments = tuple(
        RowSegment(i, 1, PREFIX, 100 + shift + i, (Range(0, PREFIX, 0), Range(100 + shift + i, 1, PREFIX)))
        for i in range(rows)
    )
    tokens = [20 + shift + i for i in range(rows)]
    owned = tuple(DeltaGroup(digest, start, end, weights) for digest, weights, start, end in groups)
    return Batch(tokens, [PREFIX] * rows, segments, owned, list(range(rows)))


def adapter_weights(model: Any, root: Path, device: str = "cpu") -> dict[str, Any]:
    """Three adapters' weights by name: two of ranks that share a bucket, one of a larger."""
    settings = {"a": (SEVEN, 4), "b": (("q_proj", "down_proj"), 8), "c": (SEVEN, 20)}
    found: dict[str, Any] = {}
    for seed, (name, (targets, rank)) in enumerate(settings.items()):
        folder = make_adapter_folder(model, root / name, targets=targets, rank=rank, seed=seed)
        shapes = linear_shapes(model)
        found[name] = load_adapter(folder, shapes=shapes, dtype=torch.float32, device=device).weights
    return found
