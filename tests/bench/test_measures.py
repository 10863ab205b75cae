"""Medians, the machine, contexts, and what a decode step reads."""

from __future__ import annotations

import threading

import pytest
import torch

from midstream.bench import machine as machine_module
from midstream.bench.contexts import SHORTEST, conversation, parting_early, parting_late
from midstream.bench.figures import spread, timed
from midstream.bench.machine import busy_warnings, machine, matrix_throughput, read_bandwidth
from midstream.bench.model import ModelFacts, _windows
from midstream.session import Engine
from tests.helpers import tiny_config
from tests.tiny import tiny_chat


def test_spread_is_the_median_and_the_quartiles() -> None:
    assert spread([5.0, 1.0, 4.0, 2.0, 3.0]) == {"median": 3.0, "q1": 2.0, "q3": 4.0}
    assert spread([7.0]) == {"median": 7.0, "q1": 7.0, "q3": 7.0}
    calls: list[int] = []
    assert timed(lambda: calls.append(1)) >= 0
    assert calls == [1]


def test_the_machine_is_measured_in_threads_that_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(machine_module._READ_BYTES, "cpu", 1 << 20)
    monkeypatch.setitem(machine_module._MATRIX_SIZE, "cpu", 32)
    assert read_bandwidth() > 0
    assert matrix_throughput(torch.bfloat16) > 0
    found = machine(dtype=torch.bfloat16)
    assert not any(thread.name.startswith("midstream-apart") for thread in threading.enumerate())
    assert list(found) == [
        "processor",
        "cores",
        "threads",
        "instructions",
        "torch",
        "read_gb_per_s",
        "gflop_per_s_bfloat16",
        "load_average",
    ]


def test_a_busy_machine_is_told() -> None:
    assert busy_warnings(0.1, 4.5, cores=8, threads=4) == []
    (before,) = busy_warnings(2.5, 4.5, cores=8, threads=4)
    assert "2.50 on 8 cores" in before
    (during,) = busy_warnings(0.1, 6.5, cores=8, threads=4)
    assert "6.50" in during


@pytest.mark.parametrize("tokens", [SHORTEST, 257, 9000])
def test_conversations_have_the_length_asked_for_and_part_where_they_should(tokens: int) -> None:
    chat = tiny_chat()
    assert len(conversation(chat, tokens)) == tokens
    assert chat.decode(conversation(chat, tokens)).endswith("<|im_end|>\n")
    early = [parting_early(chat, tokens, number) for number in range(8)]
    late = [parting_late(chat, tokens, number) for number in range(3)]
    assert {len(each) for each in early + late} == {tokens}
    assert len({each[:4] for each in early}) == 8
    assert len({each[: tokens - SHORTEST // 2] for each in late}) == 1
    assert len(set(late)) == 3


def test_a_step_reads_every_weight_and_all_kv_once(engine: Engine) -> None:
    facts = ModelFacts.of(engine)
    config = tiny_config()
    hidden, wide = config.hidden_size, config.intermediate_size
    layer = 2 * hidden * hidden + 2 * hidden * hidden // 2 + 3 * hidden * wide
    assert facts.weight_bytes == 4 * (2 * layer + config.vocab_size * hidden)
    assert facts.token_bytes == 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, their size, bytes
    assert facts.step_bytes(100) == facts.weight_bytes + 100 * facts.token_bytes
    assert facts.dtype_name == "float32"


def test_a_layer_with_a_window_reads_no_more_than_that(engine: Engine) -> None:
    facts = ModelFacts.of(engine)
    half = ModelFacts(**{**{name: getattr(facts, name) for name in facts.__slots__}, "windows": [16, None]})
    assert half.step_bytes(100) - half.weight_bytes == (16 + 100) * facts.token_bytes // 2

    class Config:
        sliding_window = 16

    assert _windows(Config(), 2) == [16, 16]
    Config.layer_types = ["full_attention", "sliding_attention"]  # type: ignore[attr-defined]
    assert _windows(Config(), 2) == [None, 16]
    assert _windows(tiny_config(), 2) == [None, None]
