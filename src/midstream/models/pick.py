"""Which kind of forward serves a model on its device."""

from __future__ import annotations

from midstream.models.cuda.graphs import GraphForward, GraphRecorder, can_record
from midstream.models.forward import EagerForward, Forward
from midstream.models.kv import KVKind
from midstream.models.load import LoadedModel
from midstream.models.pool import KVPool


def pick_forward(loaded: LoadedModel, num_slots: int, kv_dtype: KVKind | None = None) -> Forward:
    """The fastest forward for a model, with a pool of `num_slots` for its keys and values."""
    recorded = loaded.device.type == "cuda" and can_record(loaded)
    pool = KVPool(loaded.kv_shapes, num_slots, loaded.dtype, loaded.device, kv_dtype, spare=int(recorded))
    return GraphForward(loaded, pool, GraphRecorder()) if recorded else EagerForward(loaded, pool)
