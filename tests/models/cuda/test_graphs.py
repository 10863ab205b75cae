"""Recorded small steps: a replay gives what the model gives, whatever rows, contexts and adapters it is filled with."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from midstream.models.attention_plan import Range
from midstream.models.cuda.graphs import can_record, packed
from midstream.models.cuda.kernels import CudaKernels
from midstream.models.kernels import TorchKernels
from midstream.models.load import LoadedModel, prepare
from tests.helpers import tiny_llama
from tests.models.cuda.pair import PREFIX, SLOTS, Pair, adapter_weights, batch, decodes
from tests.models.cuda.plain import Again, plain_kernels
from tests.tiny import tiny_chat


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama(hidden=64)


@pytest.fixture(scope="module")
def adapters(model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return adapter_weights(model, tmp_path_factory.mktemp("adapters"))


@pytest.fixture
def pair(model: Any) -> Pair:
    return Pair(model, plain_kernels(), Again())


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
    keys = pair.pools[0].layers[0].keys
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
