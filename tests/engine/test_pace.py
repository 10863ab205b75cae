"""A long prefill's part of a shared step: bounded by time, and everything else as before."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from midstream.engine.pace import Pace
from midstream.engine.step import Step
from midstream.types import Request, SamplingParams
from tests.tiny import tiny_engine


def test_the_share_follows_what_tokens_have_cost() -> None:
    pace = Pace(0.1)
    assert pace.tokens(512) == 512  # nothing is known yet
    for _ in range(40):
        pace.note(512, 0.512)
    assert pace.tokens(512) == pytest.approx(100, abs=1)
    assert pace.tokens(64) == 64
    for _ in range(40):
        pace.note(128, 0.512)  # a longer context: four times as dear
    assert pace.tokens(512) == pytest.approx(32, abs=8)
    pace.note(128, 1000.0)
    assert pace.tokens(512) == 32  # never so few that the products idle


def test_short_steps_say_nothing_of_prefill() -> None:
    pace = Pace(0.1)
    pace.note(31, 50.0)
    assert pace.seconds_per_token is None


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """Every step that is run."""
    from midstream.engine.runner import Runner

    seen: list[Step] = []
    run = Runner.run

    def noting(self: Runner, step: Step) -> Any:
        seen.append(step)
        return run(self, step)

    monkeypatch.setattr(Runner, "run", noting)
    return seen


async def test_a_long_prefill_is_cut_alone_and_beside_a_decode(model: Any, steps: list[Step]) -> None:
    engine = tiny_engine(model, max_step_tokens=256, prefill_step_s=1e-6)
    try:
        long = Request(prompt=tuple(i % 300 for i in range(500)), params=SamplingParams(max_tokens=1))
        alone = await engine.complete(long)
        # Nothing is known before the first step; then as few as there may be.
        assert [step.num_tokens for step in steps] == [256, *[32] * 7, 20]
        await engine.clear_cache()
        steps.clear()

        params = SamplingParams(max_tokens=300, ignore_eos=True)
        decoding = asyncio.create_task(engine.complete(Request(prompt=(5, 6, 7), params=params)))
        while len(steps) < 3:
            await asyncio.sleep(0)
        beside = await engine.complete(long)
        await decoding
        shared = [step.num_tokens for step in steps if len(step.segments) > 1]
        # 32 tokens of the long one, and the decode's one, until one of the two is done.
        assert len(shared) >= 10
        assert max(shared) <= 33
        assert beside.token_ids == alone.token_ids
    finally:
        await engine.aclose()


async def test_prompts_that_come_together_share_what_a_step_may_take(model: Any, steps: list[Step]) -> None:
    engine = tiny_engine(model, max_step_tokens=256, prefill_step_s=1e-6)
    try:
        await engine.complete(Request(prompt=tuple(range(40)), params=SamplingParams(max_tokens=1)))
        steps.clear()
        prompts = [tuple((i * k + k) % 300 for i in range(100)) for k in (7, 11, 13)]
        params = SamplingParams(max_tokens=1)
        await asyncio.gather(*(engine.complete(Request(prompt=prompt, params=params)) for prompt in prompts))
        assert max(step.num_tokens for step in steps) <= 64  # 32 of long ones, and as many of one whose rest is short
        assert sum(step.num_tokens for step in steps) == 300
    finally:
        await engine.aclose()
