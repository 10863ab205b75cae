"""Small steps as CUDA graphs: a forward of few rows is recorded once for each bucket and then replayed.

At few rows the host, which launches hundreds of kernels a step, is slower than the device. A recorded forward reads
all that differs from step to step from one buffer: tokens, positions, slots, the tables of attention, and each row's
adapter. The adapters' factors stand in a table of addresses, so a recording knows whether there are adapters and not
which. Rows that fill a bucket up read token 0, see nothing, belong to no adapter, and write to a slot of the pool that
no request ever gets.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from midstream.models.attention_plan import AttentionPlan
from midstream.models.cuda.buckets import MOST_ROWS, Bucket, step_bucket
from midstream.models.cuda.factors import FixedFactors, Numbers, RowOwners, owners_of
from midstream.models.cuda.kernels import MAX_RANK, OWNERS, CudaKernels, tables_key
from midstream.models.cuda.tables import DeviceTables, Tables, Tiling, build_tables
from midstream.models.deltas import DeltaGroup
from midstream.models.device import on_device
from midstream.models.forward import Batch, EagerForward, on_host
from midstream.models.layer import FusedLayer
from midstream.models.linear import AdapterLinear
from midstream.models.load import LoadedModel
from midstream.models.pool import ForwardPlan, KVPool

log = logging.getLogger(__name__)

MOST_ADAPTERS = 16
# Buckets whose recordings are kept, and the sightings of a bucket from which on it is recorded: one that comes but
# once is not worth the three forwards.
_MOST_RECORDINGS = 64
_SIGHTINGS = 2
# Rotary embeddings that look at the positions to choose their frequencies, which a recording cannot do.
_LOOKING = ("dynamic", "longrope")


class Recorder(Protocol):
    """Records what a function launches."""

    def record(self, forward: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """How to run it again, and its result, which each run overwrites."""
        ...


class GraphRecorder:
    """Records on a CUDA device. All recordings share their memory, so a result is to be copied before the next runs."""

    def __init__(self) -> None:
        self._memory = torch.cuda.graph_pool_handle()

    def record(self, forward: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        # Compiles kernels and makes the libraries' workspaces, neither of which can be recorded.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                forward()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads load adapters meanwhile; only what this thread does may spoil the recording.
        with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
            output = forward()
        return graph.replay, output


class LayerKind(NamedTuple):
    """What layers must share to share their tables."""

    heads: int
    kv_heads: int
    window: int | None
    tiling: Tiling


class Recording(NamedTuple):
    """A recorded forward: its buffer of numbers, how to run it, its logits [1, rows, vocab]."""

    numbers: Tensor
    replay: Callable[[], None]
    logits: Tensor


class GraphForward:
    """Replays small steps, and calls the model for all others."""

    def __init__(self, loaded: LoadedModel, pool: KVPool, recorder: Recorder) -> None:
        """The pool has a spare slot. `can_record(loaded)` must hold."""
        self._loaded = loaded
        self._pool = pool
        self._recorder = recorder
        self._eager = EagerForward(loaded, pool)
        self._kinds = layer_kinds(loaded)
        products = (
            m.parts for m in loaded.model.modules() if isinstance(m, AdapterLinear) and m.context is loaded.deltas
        )
        self._factors = FixedFactors(products, MOST_ADAPTERS, loaded.device)
        self._recordings: OrderedDict[Bucket, Recording] = OrderedDict()
        self._sightings: dict[Bucket, int] = {}
        self._broken = False

    def run(self, batch: Batch) -> Tensor:
        with on_device(self._loaded.device):
            return self._run(batch)

    def _run(self, batch: Batch) -> Tensor:
        step = self._small_step(batch)
        if step is None:
            return self._eager.run(batch)
        bucket, numbers = step
        recording = self._recordings.get(bucket)
        if recording is None:
            self._sightings[bucket] = self._sightings.get(bucket, 0) + 1
            if self._sightings[bucket] < _SIGHTINGS:
                return self._eager.run(batch)
            self._factors.fill(batch.groups)
            recording = self._record(bucket, numbers)
            if recording is None:
                return self._eager.run(batch)
        self._recordings.move_to_end(bucket)
        self._factors.fill(batch.groups)
        recording.numbers.copy_(torch.from_numpy(numbers))
        recording.replay()
        rows = torch.tensor(batch.wanted, dtype=torch.long, device=recording.logits.device)
        return on_host(recording.logits[0].index_select(0, rows))

    def _small_step(self, batch: Batch) -> tuple[Bucket, Numbers] | None:
        """The bucket of a step that is to be replayed, and its numbers."""
        rows = len(batch.tokens)
        if self._broken or rows > MOST_ROWS or len(batch.groups) > MOST_ADAPTERS:
            return None
        rank_block = self._factors.rank_block(batch.groups)
        if rank_block > MAX_RANK or (batch.groups and not rank_block):
            return None
        tables = [build_tables(batch.segments, rows, kind.tiling, kind.window) for kind in self._kinds]
        bucket = step_bucket([(t, kind.tiling) for t, kind in zip(tables, self._kinds, strict=True)], rows, rank_block)
        return None if bucket is None else (bucket, packed(batch, tables, bucket, self._pool.num_slots))

    def _record(self, bucket: Bucket, numbers: Numbers) -> Recording | None:
        """None where it fails, and then nothing is recorded any more."""
        buffer = torch.from_numpy(numbers).to(self._loaded.device)
        try:
            forward = self._forward_over(bucket, buffer)
            replay, logits = self._recorder.record(forward)
        except Exception:
            log.exception("a step cannot be recorded as a CUDA graph; all steps are launched from now on")
            self._broken = True
            return None
        recording = self._recordings[bucket] = Recording(buffer, replay, logits)
        while len(self._recordings) > _MOST_RECORDINGS:
            self._recordings.popitem(last=False)
        return recording

    def _forward_over(self, bucket: Bucket, buffer: Tensor) -> Callable[[], Tensor]:
        """A function that gives the logits [1, rows, vocab] of what stands in the buffer."""
        loaded = self._loaded
        tokens, positions, slots, owners, *tables = buffer.split(_sizes(bucket))
        plan = AttentionPlan((), loaded.dtype, loaded.device, bucket.rows)
        plan.write_slots = slots
        for kind, shape, part in zip(self._kinds, bucket.tables, tables, strict=True):
            key = tables_key(kind.heads, kind.kv_heads, kind.window)
            plan.prepared[key] = DeviceTables.over(part, shape, direct=False)
        whole = ForwardPlan(plan, self._pool, loaded.kernels)

        def forward() -> Tensor:
            with self._adapters(bucket, owners):
                output = loaded.model(
                    input_ids=tokens[None], position_ids=positions[None], use_cache=False, midstream_plan=whole
                )
            logits: Tensor = output.logits
            return logits

        return forward

    @contextmanager
    def _adapters(self, bucket: Bucket, owners: Tensor) -> Iterator[None]:
        """Meanwhile the layers add the deltas that the fixed table says, to the rows that `owners` says."""
        deltas = self._loaded.deltas
        if bucket.rank_block:
            deltas.set([DeltaGroup("", 0, bucket.rows, {})])
            deltas.tables = dict(self._factors.products(bucket.rank_block))
            deltas.owned = {OWNERS: RowOwners(0, bucket.rows, owners)}
        try:
            yield
        finally:
            deltas.set(())
            deltas.key = ()  # these tables are no adapter's own


def layer_kinds(loaded: LoadedModel) -> tuple[LayerKind, ...]:
    """The kinds of layers that a model has, in the order in which they are met."""
    kernels = loaded.kernels
    assert isinstance(kernels, CudaKernels)
    kinds: dict[LayerKind, None] = {}
    for layer in loaded.model.modules():
        if isinstance(layer, FusedLayer):
            shape = layer.shape
            tiling = kernels.tiling(shape.heads, shape.kv_heads, shape.dim, loaded.dtype)
            assert tiling is not None
            kinds[LayerKind(shape.heads, shape.kv_heads, shape.window, tiling)] = None
    return tuple(kinds)


def can_record(loaded: LoadedModel) -> bool:
    """Whether a model's forward does the same whatever its numbers are: our own layers do, others may not."""
    kernels = loaded.kernels
    if not isinstance(kernels, CudaKernels):
        return False
    layers = [module for module in loaded.model.modules() if isinstance(module, FusedLayer)]
    served = all(
        kernels.tiling(layer.shape.heads, layer.shape.kv_heads, layer.shape.dim, loaded.dtype) for layer in layers
    )
    looking = any(_looks(getattr(module, "rope_type", None)) for module in loaded.model.modules())
    return served and len(layers) == len(loaded.kv_shapes) and not looking


def packed(batch: Batch, tables: list[Tables], bucket: Bucket, spare_slot: int) -> Numbers:
    """All that a recorded forward reads: tokens, positions, slots, owners, and the tables of each kind of layer."""
    rows = len(batch.tokens)
    slots = [slot for s in batch.segments for slot in range(s.slot, s.slot + s.count)]
    head = np.zeros((4, bucket.rows), np.int64)
    head[0, :rows], head[1, :rows] = batch.tokens, batch.positions
    head[2], head[2, :rows] = spare_slot, slots
    head[3], head[3, :rows] = -1, owners_of(batch.groups, 0, rows)
    parts = (table.packed(shape) for table, shape in zip(tables, bucket.tables, strict=True))
    return np.concatenate([head.ravel(), *parts])


def _sizes(bucket: Bucket) -> list[int]:
    """Of the parts of `packed`."""
    return [*(bucket.rows,) * 4, *(shape.numbers for shape in bucket.tables)]


def _looks(rope_type: object) -> bool:
    kinds = rope_type.values() if isinstance(rope_type, dict) else (rope_type,)
    return any(kind in _LOOKING for kind in kinds)
