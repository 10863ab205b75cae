"""The sizing model: bytes by hand, and what must follow whatever the numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks.scaling import GPUS, LARGE, Machine, Shape
from benchmarks.sizing import (
    Calls,
    Load,
    adapter_bytes,
    conversation_bytes,
    gpu_table,
    kept,
    memory_table,
    plan,
    turn_s,
)

SMALL, LARGER = LARGE
ONE, EIGHT = GPUS
LOAD = Load()
KINDS: tuple[Calls, ...] = ("alora", "lora kept", "lora read again")


def test_the_page_has_the_tables() -> None:
    page = (Path(__file__).parents[2] / "docs" / "scale.md").read_text(encoding="utf-8")
    assert memory_table(LOAD) in page
    assert gpu_table(LOAD) in page


def test_bytes_by_hand() -> None:
    # 40 layers x 8 heads of keys and of values x 128 numbers x 2 bytes.
    assert SMALL.kv_bytes_per_token == 40 * 8 * 2 * 128 * 2 == 163_840
    assert conversation_bytes(SMALL, LOAD, "alora") == 8192 * 163_840
    assert conversation_bytes(SMALL, LOAD, "lora kept") == 7 * 8192 * 163_840
    # Rank times (in + out) of q, k, v, o, gate, up and down.
    layer = 2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 12800)
    assert adapter_bytes(SMALL, 32) == 40 * 32 * layer * 2


def test_a_model_that_does_not_fit_has_no_plan() -> None:
    assert kept(LARGER, 1, LOAD, "alora") == 0
    assert plan(LARGER, ONE, 1, LOAD, "alora") is None


def test_an_answer_by_hand() -> None:
    """A machine that computes for nothing: a turn's time is what is read."""
    machine = Machine("wide", 1e12, 1e30)
    load = replace(LOAD, calls=0)
    read = 8192 * 163_840 + (SMALL.read_bytes(0) + 16 * 8192 * 163_840) * 200 / 16
    # The prompt's forward sees what was there before the answer.
    read -= 200 * 163_840
    assert turn_s(SMALL, machine, load, "alora", 1.0) == pytest.approx(read / 1e12)


@pytest.mark.parametrize("calls", KINDS)
@pytest.mark.parametrize(("shape", "machine", "gpus"), [(SMALL, ONE, 1), (LARGER, EIGHT, 8)])
def test_more_to_do_never_takes_fewer(shape: Shape, machine: Machine, gpus: int, calls: Calls) -> None:
    def replicas(load: Load, *, affinity: bool = True) -> int:
        found = plan(shape, machine, gpus, load, calls, affinity=affinity)
        assert found is not None
        return found.replicas

    usual = replicas(LOAD)
    for more in (
        replace(LOAD, conversations=2000),
        replace(LOAD, every_s=15.0),
        replace(LOAD, context=16384),
        replace(LOAD, answer=400),
        replace(LOAD, calls=12),
        replace(LOAD, utilisation=0.35),
    ):
        assert replicas(more) >= usual
    assert replicas(LOAD, affinity=False) >= usual


def test_a_hit_saves_time_and_calls_of_aloras_cost_least() -> None:
    for calls in KINDS:
        assert turn_s(SMALL, ONE, LOAD, calls, 1.0) < turn_s(SMALL, ONE, LOAD, calls, 0.5)
    times = [turn_s(SMALL, ONE, LOAD, calls, 1.0) for calls in KINDS]
    assert times == sorted(times)
    assert kept(SMALL, 1, LOAD, "lora kept") == pytest.approx(kept(SMALL, 1, LOAD, "alora") / 7)


def test_the_plan_is_the_fewest_that_are_enough() -> None:
    found = plan(SMALL, ONE, 1, LOAD, "alora")
    assert found is not None
    assert found.hit_rate == pytest.approx(found.replicas * found.kept / LOAD.conversations)

    def busy(replicas: int) -> float:
        hit_rate = min(1.0, replicas * found.kept / LOAD.conversations)
        return LOAD.conversations / LOAD.every_s * turn_s(SMALL, ONE, LOAD, "alora", hit_rate) / replicas

    assert busy(found.replicas) <= LOAD.utilisation < busy(found.replicas - 1)
