"""Recorded small steps: a replay gives what the model gives, whichever rows, contexts and adapters it is filled with."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from midstream.adapters.weights import load_adapter
from midstream.models.attention_plan import Range, RowSegment
from midstream.models.cuda.graphs import GraphForward, can_record, packed
from midstream.models.cuda.kernels import CudaKernels
from midstream.models.deltas import DeltaGroup
from midstream.models.forward import Batch, EagerForward
from midstream.models.kernels import TorchKernels
from midstream.models.load import LoadedModel, prepare
from midstream.models.pool import KVPool
from tests.helpers import SEVEN, make_adapter_folder, tiny_llama
from tests.models.cuda.plain import Again, plain_kernels
from tests.tiny import tiny_chat

SLOTS = 400
PREFIX = 60


class Pair:
    """One model with two pools of the same content: one whose small steps are replayed, one that calls the model."""

    def __init__(self, model: Any, kernels: Any) -> None:
        self.loaded = prepare(copy.deepcopy(model), tiny_chat(), name="tiny", kernels=kernels)
        self.recorder = Again()
        self.pools = [
            KVPool(self.loaded.kv_shapes, SLOTS, self.loaded.dtype, self.loaded.device, spare=1) for _ in range(2)
        ]
        for pool in self.pools:
            for numbers in (*pool.keys, *pool.values):
                numbers.fill_(7.0)
        self.replayed = GraphForward(self.loaded, self.pools[0], self.recorder)
        self.eager = EagerForward(self.loaded, self.pools[1])
        self.both(batch(PREFIX + 10, 0, 0, wanted=[]))

    @torch.inference_mode()
    def both(self, step: Batch) -> Tensor:
        """Logits of both, which agree, as do the pools but for the spare slot."""
        found, expected = self.replayed.run(step), self.eager.run(step)
        wanted = len(step.wanted)
        torch.testing.assert_close(found[:wanted], expected[:wanted], rtol=1e-4, atol=1e-4)
        for ours, theirs in zip(self.pools[0].keys, self.pools[1].keys, strict=True):
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


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama(hidden=64)


@pytest.fixture(scope="module")
def adapters(model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    loaded = prepare(copy.deepcopy(model), tiny_chat(), name="tiny", kernels=plain_kernels())
    root = tmp_path_factory.mktemp("adapters")
    settings = {"a": (SEVEN, 4), "b": (("q_proj", "down_proj"), 8), "c": (SEVEN, 20)}
    found = {}
    for seed, (name, (targets, rank)) in enumerate(settings.items()):
        folder = make_adapter_folder(model, root / name, targets=targets, rank=rank, seed=seed)
        found[name] = load_adapter(folder, shapes=loaded.linear_shapes, dtype=torch.float32).weights
    return found


@pytest.fixture
def pair(model: Any) -> Pair:
    return Pair(model, plain_kernels())


def test_a_bucket_is_recorded_when_it_comes_again_and_then_replayed(pair: Pair) -> None:
    assert pair.recorder.recorded == 0
    for shift, (recorded, replayed) in enumerate([(0, 0), (1, 1), (1, 2), (1, 3)]):
        pair.both(decodes(3, shift=10 * shift))
        assert (pair.recorder.recorded, pair.recorder.replayed) == (recorded, replayed)
    pair.both(decodes(4, shift=50))
    assert (pair.recorder.recorded, pair.recorder.replayed) == (1, 4)  # four rows fill the same bucket


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 31, 64])
def test_a_replay_gives_the_models_logits_for_any_number_of_rows(pair: Pair, rows: int) -> None:
    logits = [pair.both(decodes(rows, shift=shift)) for shift in (0, 70, 140)]
    assert pair.recorder.replayed == 2
    assert not torch.equal(logits[1], logits[2])


def test_short_prefills_and_decodes_share_a_recording_when_their_tables_fit(pair: Pair) -> None:
    for position in (PREFIX, PREFIX + 1, PREFIX + 2):
        pair.both(batch(6, 200, position, wanted=[5], seen=(Range(0, position, 0),)))
    assert pair.recorder.replayed == 2


def test_padding_writes_to_the_spare_slot_and_to_no_other(pair: Pair) -> None:
    for shift in (0, 3, 6):
        pair.both(decodes(3, shift=shift))
    keys = pair.pools[0].keys[0]
    written = [*range(PREFIX + 10), *range(100, 109), SLOTS]
    untouched = [slot for slot in range(SLOTS) if slot not in written]
    assert (keys[:, untouched] == 7.0).all()
    assert (keys[:, written] != 7.0).any(-1).all()


def test_one_recording_serves_any_adapters_of_its_rank(pair: Pair, adapters: dict[str, Any]) -> None:
    a, b = ("a", adapters["a"]), ("b", adapters["b"])
    steps = [
        decodes(4, (*a, 1, 4)),
        decodes(4, (*a, 0, 1), (*b, 2, 4), shift=10),
        decodes(4, (*b, 0, 4), shift=20),
        decodes(3, (*a, 2, 3), shift=30),
    ]
    found = [pair.both(step) for step in steps]
    assert (pair.recorder.recorded, pair.recorder.replayed) == (1, 3)
    bare = pair.both(decodes(4, shift=10))
    assert (found[1] - bare)[[0, 2, 3]].abs().amax(-1).min() > 1e-2
    torch.testing.assert_close(found[1][1], bare[1], rtol=1e-4, atol=1e-4)
    # A higher rank is another bucket; the base model's own steps are too.
    for _ in range(2):
        pair.both(decodes(4, ("c", adapters["c"], 0, 2), shift=40))
    assert pair.recorder.recorded == 2


def test_after_a_recording_with_adapters_the_models_own_steps_have_none(pair: Pair, adapters: dict[str, Any]) -> None:
    for shift in (0, 10):
        pair.both(decodes(2, ("a", adapters["a"], 0, 2), shift=shift))
    assert pair.recorder.recorded == 1
    assert pair.loaded.deltas.groups == ()
    pair.both(batch(70, 200, 0, wanted=[69]))
    pair.both(decodes(66, ("a", adapters["a"], 0, 66), shift=200))  # too many rows: by the model


def test_steps_of_many_rows_or_adapters_are_the_models(pair: Pair, adapters: dict[str, Any]) -> None:
    for _ in range(3):
        pair.both(batch(65, 200, 0, wanted=[64]))
        many = [(f"a{i}", adapters["a"], i, i + 1) for i in range(17)]
        pair.both(decodes(17, *many))
    assert pair.recorder.recorded == 0


def test_where_recording_fails_all_steps_are_the_models(
    pair: Pair, adapters: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    tries = 0

    def fail(forward: Callable[[], Tensor]) -> Any:
        nonlocal tries
        tries += 1
        raise RuntimeError("operation not permitted when stream is capturing")

    pair.recorder.record = fail  # type: ignore[method-assign]
    for shift in range(4):
        pair.both(decodes(2, ("a", adapters["a"], 0, 1), shift=shift))
        pair.both(decodes(3, shift=shift))
    assert tries == 1
    assert "cannot be recorded" in caplog.text


def test_what_can_be_recorded(model: Any, pair: Pair) -> None:
    assert can_record(pair.loaded)
    plain = prepare(copy.deepcopy(model), tiny_chat(), name="tiny", kernels=TorchKernels())
    assert not can_record(plain)
    looking = copy.deepcopy(model)
    looking.model.rotary_emb.rope_type = "dynamic"
    assert not can_record(prepared(looking, pair.loaded.kernels))
    foreign = prepared(copy.deepcopy(model), pair.loaded.kernels)
    foreign.model.model.layers[1] = torch.nn.Identity()
    assert not can_record(foreign)


def test_the_buffer_of_a_step(pair: Pair, adapters: dict[str, Any]) -> None:
    step = decodes(3, ("a", adapters["a"], 1, 3))
    found = pair.replayed._small_step(step)
    assert found is not None
    bucket, numbers = found
    assert numbers[:16].reshape(4, 4).tolist() == [
        [20, 21, 22, 0],
        [PREFIX] * 3 + [0],
        [100, 101, 102, SLOTS],
        [-1, 0, 0, -1],
    ]
    assert (packed(step, [], bucket._replace(tables=()), SLOTS) == numbers[:16]).all()


def prepared(model: Any, kernels: Any) -> LoadedModel:
    assert isinstance(kernels, CudaKernels)
    return prepare(model, tiny_chat(), name="tiny", kernels=kernels)
