"""Reuse equals recomputation: whatever stands in the cache, every logit is that of an empty one."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from midstream.engine.engine import AsyncEngine
from midstream.errors import MidstreamError
from midstream.types import Request, SamplingParams
from tests.engine.conftest import SETTINGS, loaded

# Pieces of conversations: prompts are sequences of these, so that random ones share prefixes of all lengths.
PIECES = [tuple((7 * i + 11 * j) % 250 for j in range(length)) for i, length in enumerate((3, 9, 17, 40))]
CALLS = {name: tuple(s["invocation"]) for name, s in SETTINGS.items() if "invocation" in s}
KINDS = [None, "lora", "lora2", *CALLS]


@st.composite
def requests(draw: st.DrawFn) -> tuple[Request, bool]:
    """A request, and whether it is cancelled in its midst."""
    adapter = draw(st.sampled_from(KINDS))
    pieces = draw(st.lists(st.sampled_from(PIECES + list(CALLS.values())), min_size=1, max_size=4))
    tokens = tuple(itertools.chain(*pieces)) + CALLS.get(adapter or "", ())
    if draw(st.booleans()):
        tokens += draw(st.sampled_from(PIECES))[:5]
    params = SamplingParams(
        max_tokens=draw(st.integers(1, 6)),
        n=draw(st.integers(1, 2)),
        temperature=draw(st.sampled_from([0.0, 1.0])),
        seed=draw(st.integers(0, 9)),
        ignore_eos=True,
    )
    return Request(prompt=tokens, adapter=adapter, params=params), draw(st.integers(0, 5)) == 0


async def run_batch(engine: AsyncEngine, batch: list[tuple[Request, bool]]) -> list[Any]:
    tasks = [asyncio.create_task(engine.complete(request)) for request, _ in batch]
    await asyncio.sleep(0.002)
    for task, (_, cancelled) in zip(tasks, batch, strict=True):
        if cancelled:
            task.cancel()
    return await asyncio.gather(*tasks, return_exceptions=True)


class Watched:
    """An engine whose every step is followed by the integrity check, and whose every row of logits is kept."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        self.rows: dict[tuple[str, int], list[torch.Tensor]] = {}
        core = engine._core
        step, sample = core.step, core._sample

        def checked_step(runner: Any) -> bool:
            more = step(runner)
            core.check_integrity()
            return more

        def kept_sample(branch: Any, row: torch.Tensor) -> None:
            self.rows.setdefault((branch.job.request_id, branch.index), []).append(row.clone())
            sample(branch, row)

        core.step = checked_step  # type: ignore[method-assign]
        core._sample = kept_sample  # type: ignore[method-assign]


def compare(one: Any, watched: Watched, alone: Any, fresh: Watched) -> None:
    for a, b in zip(one.choices, alone.choices, strict=True):
        assert a.token_ids == b.token_ids
        ours, theirs = watched.rows[one.request_id, a.index], fresh.rows[alone.request_id, b.index]
        assert len(ours) == len(theirs) == len(a.token_ids)
        assert (torch.stack(ours) - torch.stack(theirs)).abs().max() < 1e-3


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.lists(requests(), min_size=1, max_size=4), min_size=1, max_size=4), st.sampled_from([5, 512]))
def test_any_history_of_requests_gives_the_logits_of_an_empty_cache(
    model: Any, folders: dict[str, Path], batches: list[list[tuple[Request, bool]]], step_tokens: int
) -> None:
    async def scenario() -> None:
        # Room for a few prompts only, so that eviction and waiting happen all the time.
        engine = await loaded(model, folders, kv_budget_bytes=260 * 256, max_step_tokens=step_tokens)
        fresh = await loaded(model, folders)
        watched, alone = Watched(engine), Watched(fresh)
        try:
            for batch in batches:
                answers = await run_batch(engine, batch)
                await engine.check_integrity()
                for (request, cancelled), answer in zip(batch, answers, strict=True):
                    if isinstance(answer, BaseException):
                        assert cancelled
                        assert isinstance(answer, (asyncio.CancelledError, MidstreamError))
                        continue
                    await fresh.clear_cache()
                    compare(answer, watched, await fresh.complete(request), alone)
            assert (await engine.stats()).running == 0
        finally:
            await engine.aclose()
            await fresh.aclose()

    asyncio.run(scenario())


TEXT = PIECES[3] + PIECES[2]


async def test_reuse_is_total(engine: AsyncEngine) -> None:
    base = await engine.complete(Request(prompt=TEXT, params=SamplingParams(max_tokens=1)))
    assert base.usage.computed_tokens == len(TEXT)
    call = await engine.complete(Request(prompt=TEXT + CALLS["other"], adapter="other"))
    assert call.activation_index == len(TEXT)
    assert call.usage.cached_base_tokens == len(TEXT)
    assert call.usage.computed_tokens == len(CALLS["other"])
    plain = await engine.complete(Request(prompt=TEXT, adapter="lora"))
    assert plain.usage.cached_tokens == 0
    assert plain.usage.computed_tokens == len(TEXT)
    again = await engine.complete(Request(prompt=(*TEXT, 5), adapter="lora"))
    assert again.usage.cached_adapter_tokens == len(TEXT)


async def test_the_base_model_re_reads_only_the_adapters_output(engine: AsyncEngine) -> None:
    await engine.warm(TEXT)
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    call = await engine.complete(Request(prompt=TEXT + CALLS["alora"], adapter="alora", params=params))
    history = TEXT + CALLS["alora"] + call.token_ids
    base = await engine.complete(Request(prompt=history, params=params))
    assert base.usage.cached_tokens == len(TEXT)
    assert base.usage.computed_tokens == len(CALLS["alora"]) + len(call.token_ids)


async def test_a_fan_out_on_a_cold_prefix_computes_it_once_in_one_forward(engine: AsyncEngine) -> None:
    prompts = {name: TEXT + call for name, call in CALLS.items()}
    before = (await engine.stats()).forwards
    one = SamplingParams(max_tokens=1)
    answers = await asyncio.gather(
        *(engine.complete(Request(prompt=p, adapter=n, params=one)) for n, p in prompts.items())
    )
    computed = sum(answer.usage.computed_tokens for answer in answers)
    assert computed == len(TEXT) + sum(len(call) for call in CALLS.values())
    # Requests reach the engine's thread one after the other: the first may start a step before the rest arrive.
    assert (await engine.stats()).forwards - before <= 2


async def test_branches_share_their_prompt(engine: AsyncEngine) -> None:
    params = SamplingParams(max_tokens=6, n=4, temperature=1.5, seed=3, ignore_eos=True)
    done = await engine.complete(Request(prompt=TEXT, params=params))
    assert done.usage.computed_tokens == len(TEXT)
    assert done.usage.completion_tokens == 24
    assert len({choice.token_ids for choice in done.choices}) > 1
    stats = await engine.stats()
    assert stats.kv_used_bytes <= (len(TEXT) + 4 * 6) * 256


async def test_memory_of_six_adapters_over_one_conversation_is_that_of_one(engine: AsyncEngine) -> None:
    await engine.warm(TEXT)
    one = (await engine.stats()).kv_used_bytes
    for name, call in CALLS.items():
        await engine.complete(Request(prompt=TEXT + call, adapter=name, params=SamplingParams(max_tokens=1)))
    extra = sum(len(call) for call in CALLS.values())
    assert (await engine.stats()).kv_used_bytes <= one + extra * 256


@pytest.mark.parametrize("budget_tokens", [90, 120])
async def test_memory_pressure_delays_but_never_loses_a_request(
    model: Any, folders: dict[str, Path], budget_tokens: int
) -> None:
    engine = await loaded(model, folders, kv_budget_bytes=budget_tokens * 256)
    try:
        requests = [
            Request(prompt=(i, *TEXT), adapter=("lora" if i % 2 else None), params=SamplingParams(max_tokens=20))
            for i in range(12)
        ]
        answers = await asyncio.gather(*(engine.complete(r) for r in requests))
        assert all(answer.choices[0].finish_reason in ("length", "stop") for answer in answers)
        await engine.check_integrity()
    finally:
        await engine.aclose()
