"""What is measured is what it says: tokens computed, bytes kept, and an error where something else was measured."""

from __future__ import annotations

import pytest

from midstream.bench.adapters import FANOUT, load_adapters
from midstream.bench.model import ModelFacts
from midstream.bench.work import FREE_TOKENS, STREAMS, Work
from midstream.errors import MidstreamError
from midstream.session import Engine
from midstream.types import Completion, Request
from tests.helpers import tiny_llama
from tests.tiny import tiny_chat, tiny_engine

CALLS = {
    "base_all_s",
    "base_last_s",
    "label_alora_s",
    "label_lora_s",
    "free_alora_s",
    "free_lora_s",
    "fanout_s",
    "kv_one_bytes",
    "kv_all_bytes",
}
TOKENS = 64
INVOCATION = len(tiny_chat().encode("<|im_start|>bench\n"))


class Spied:
    """The completions that an engine gave."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.found: list[Completion] = []
        complete = engine.aio.complete

        async def spy(request: Request) -> Completion:
            self.found.append(await complete(request))
            return self.found[-1]

        monkeypatch.setattr(engine.aio, "complete", spy)


@pytest.fixture
def spied(engine: Engine, monkeypatch: pytest.MonkeyPatch, known_machine: None) -> tuple[Work, Spied]:
    facts = ModelFacts.of(engine)
    work = Work(engine, facts, load_adapters(engine, facts, 4))
    return work, Spied(engine, monkeypatch)


def test_a_round_of_calls_computes_what_each_side_needs_and_nothing_else(spied: tuple[Work, Spied]) -> None:
    work, spy = spied
    found = work.calls(TOKENS)
    assert found.keys() == CALLS
    assert all(value > 0 for value in found.values())
    label, free, *six, lora, lora_free = spy.found
    assert [each.usage.computed_tokens for each in (label, free, *six)] == [INVOCATION] * (2 + FANOUT)
    assert {each.usage.prompt_tokens for each in spy.found} == {TOKENS + INVOCATION}
    assert [each.usage.computed_tokens for each in (lora, lora_free)] == [TOKENS + INVOCATION] * 2
    assert [each.usage.completion_tokens for each in (free, lora_free)] == [FREE_TOKENS] * 2
    for each in (label, *six, lora):
        assert each.text in ('"yes"', '"no"')
        assert each.usage.forwards == 1, "one decision"
    assert label.prompt_token_ids == lora.prompt_token_ids
    assert len({each.adapter for each in six}) == FANOUT
    assert (label.activation_index, lora.activation_index) == (TOKENS, 0)


def test_kv_is_counted_as_the_conversation_and_what_its_adapters_add(engine: Engine, spied: tuple[Work, Spied]) -> None:
    work, _ = spied
    found = work.calls(TOKENS)
    facts = ModelFacts.of(engine)
    one, all_ = (found[name] / facts.token_bytes - TOKENS for name in ("kv_one_bytes", "kv_all_bytes"))
    assert INVOCATION <= one <= INVOCATION + 8
    assert FANOUT * INVOCATION <= all_ <= FANOUT * (INVOCATION + 8)


def test_rounds_are_alike_and_decoding_computes_a_token_a_stream(spied: tuple[Work, Spied]) -> None:
    work, spy = spied
    work.calls(TOKENS)
    work.read_streams(TOKENS, STREAMS)
    spy.found.clear()
    for _ in range(3):
        found = work.decode(TOKENS, STREAMS)
        assert found.keys() == {"step_s", "streams_step_s", "read_bytes_per_s"}
        assert found["read_bytes_per_s"] == 20e9
        assert min(found.values()) > 0
    assert len(spy.found) == 3 * (1 + STREAMS)
    assert {each.usage.computed_tokens for each in spy.found} == {1}
    assert len({each.prompt_token_ids for each in spy.found}) == STREAMS
    assert work.calls(TOKENS).keys() == CALLS


def test_one_stream_alone_where_the_others_do_not_fit(spied: tuple[Work, Spied]) -> None:
    work, _ = spied
    work.read_streams(TOKENS, 1)
    assert work.decode(TOKENS, 1).keys() == {"step_s", "read_bytes_per_s"}


def test_a_call_that_found_another_ones_kv_is_no_measurement(
    engine: Engine, spied: tuple[Work, Spied], monkeypatch: pytest.MonkeyPatch
) -> None:
    work, _ = spied
    work.calls(TOKENS)
    monkeypatch.setattr(engine, "clear_cache", lambda: None)
    with pytest.raises(MidstreamError, match="were to be measured"):
        work.calls(TOKENS)


def test_a_cache_as_small_as_it_is_said_to_be_is_enough(known_machine: None) -> None:
    facts_slots = 0
    for _ in range(2):
        slots = facts_slots or 1024
        with Engine(tiny_engine(tiny_llama(), kv_budget_bytes=slots * 256)) as engine:
            facts = ModelFacts.of(engine)
            work = Work(engine, facts, load_adapters(engine, facts, 4))
            facts_slots = max(work.needs(TOKENS)[1], work.stream_slots(TOKENS))
            assert facts.token_bytes == 256
            for _ in range(2):
                work.calls(TOKENS)
                work.read_streams(TOKENS, STREAMS)
                for _ in range(3):
                    work.decode(TOKENS, STREAMS)
