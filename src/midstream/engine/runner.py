"""Runs a Step: packs its tokens, sets the adapters' rows, and gives the logits that the step's branches need."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from midstream.adapters.weights import LoraWeights
from midstream.engine.kv_tree import Node
from midstream.engine.request import Branch
from midstream.engine.step import Segment, Step
from midstream.models.attention_plan import Range, RowSegment
from midstream.models.deltas import DeltaGroup
from midstream.models.forward import Batch
from midstream.models.kv import KVKind
from midstream.models.load import LoadedModel
from midstream.models.pick import pick_forward

WeightsOf = Callable[[str], Mapping[str, LoraWeights]]


class Runner:
    """One model and its KV pool. `weights_of` gives the weights of an adapter by its digest."""

    def __init__(
        self, loaded: LoadedModel, num_slots: int, weights_of: WeightsOf, kv_dtype: KVKind | None = None
    ) -> None:
        self._weights_of = weights_of
        self._forward = pick_forward(loaded, num_slots, kv_dtype)

    @torch.inference_mode()
    def run(self, step: Step) -> dict[Branch, Tensor]:
        """Forward the step. For each harvested branch: logits [rows, vocab] in float32."""
        batch = Batch(
            tokens=[token for segment in step.segments for token in segment.tokens],
            positions=[segment.position + i for segment in step.segments for i in range(segment.count)],
            segments=tuple(_row_segment(segment) for segment in step.segments),
            groups=tuple(DeltaGroup(digest, a, b, self._weights_of(digest)) for digest, a, b in step.groups),
            wanted=[row for harvest in step.harvests for row in harvest.rows],
        )
        return _by_branch(step, self._forward.run(batch))


def _by_branch(step: Step, logits: Tensor) -> dict[Branch, Tensor]:
    harvested: dict[Branch, Tensor] = {}
    at = 0
    for harvest in step.harvests:
        harvested[harvest.branch] = logits[at : at + len(harvest.rows)]
        at += len(harvest.rows)
    return harvested


def _row_segment(segment: Segment) -> RowSegment:
    node = segment.node
    seen = [_whole(ancestor) for ancestor in segment.ancestors]
    # A single row sees all that is before it and itself, so its own slot joins the range before it.
    own = segment.offset + 1 if segment.count == 1 else segment.offset
    if own:
        seen.append(Range(node.start, own, node.position))
    return RowSegment(segment.row, segment.count, segment.position, node.start + segment.offset, tuple(seen))


def _whole(node: Node) -> Range:
    return Range(node.start, len(node.tokens), node.position)
