"""Recorded steps on a card: a replay gives what launching gives, and padding writes to no slot that is handed out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from midstream.models.cuda.kernels import cuda_kernels
from midstream.models.pick import pick_forward
from tests.gpu.device import ON_A_CARD, Counted
from tests.helpers import tiny_llama
from tests.models.cuda.pair import PREFIX, SLOTS, Pair, adapter_weights, batch, decodes

pytestmark = ON_A_CARD


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama(hidden=64)


@pytest.fixture
def pair(model: Any) -> Iterator[Pair]:
    yield Pair(model, cuda_kernels(torch.float32, torch.device("cuda")), Counted(), "cuda")
    torch.cuda.synchronize()  # what a test has broken is told in that test


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 31, 64])
def test_a_replay_equals_launching(pair: Pair, rows: int) -> None:
    for shift in (0, 70, 140):
        pair.both(decodes(rows, shift=shift))
    assert (pair.recorder.recorded, pair.recorder.replayed) == (1, 2)


def test_short_prefills(pair: Pair) -> None:
    for count in (2, 6, 20, 64, 2, 6, 20, 64):
        pair.both(batch(count, 200, PREFIX, wanted=[count - 1]))
    assert pair.recorder.replayed == 4


def test_buckets_in_turn_do_not_disturb_each_other(pair: Pair) -> None:
    for turn in range(4):
        for rows in (1, 7, 20):
            pair.both(decodes(rows, shift=30 * turn))
    assert (pair.recorder.recorded, pair.recorder.replayed) == (3, 9)


def test_padding_writes_to_the_spare_slot_alone(pair: Pair) -> None:
    for shift in (0, 3, 6):
        pair.both(decodes(3, shift=shift))
    for numbers in (each for kv in pair.pools[0].layers for each in (kv.keys, kv.values)):
        untouched = [slot for slot in range(SLOTS) if slot >= PREFIX + 10 and not 100 <= slot < 109]
        assert (numbers[:, untouched] == 7.0).all()


def test_one_recording_serves_any_adapters_of_its_rank(pair: Pair, model: Any, tmp_path: Path) -> None:
    found = adapter_weights(model, tmp_path, "cuda")
    a, b = ("a", found["a"]), ("b", found["b"])
    for shift, groups in enumerate(([(*a, 1, 4)], [(*a, 0, 1), (*b, 2, 4)], [(*b, 0, 4)], [(*b, 0, 1), (*a, 1, 3)])):
        pair.both(decodes(4, *groups, shift=10 * shift))
    assert (pair.recorder.recorded, pair.recorder.replayed) == (1, 3)
    pair.both(decodes(4, shift=50))


def test_a_model_on_a_card_gets_recorded_steps_and_a_spare_slot(pair: Pair) -> None:
    forward = pick_forward(pair.loaded, 10)
    assert type(forward).__name__ == "GraphForward"
    assert forward._pool.layers[0].keys.shape[1] == 11  # type: ignore[attr-defined]
