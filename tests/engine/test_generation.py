"""Sampling, stopping, constraints, scores, streaming, cancelling, deadlines and the queue."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from midstream.engine.engine import AsyncEngine
from midstream.engine.sampler import choose, make_generator
from midstream.errors import (
    AdapterNotFound,
    ConstraintError,
    DeadlineExceeded,
    EngineStopped,
    ForwardFailed,
    InputError,
    MidstreamError,
    OverloadedError,
)
from midstream.types import Choice, JsonSchema, Regex, Request, SamplingParams
from tests.engine.conftest import SETTINGS, loaded
from tests.reference import logits
from tests.tiny import tiny_chat

TEXT = tuple(range(40, 70))


def request(**params: Any) -> Request:
    return Request(prompt=TEXT, params=SamplingParams(**params))


async def test_scores_are_the_models_own(engine: AsyncEngine, model: Any) -> None:
    continuations = [[1, 2, 3], [4], [1, 2, 9, 9]]
    score = await engine.score(Request(prompt=TEXT), continuations)
    for row, continuation in zip(score.logprobs, continuations, strict=True):
        table = logits(model, [*TEXT, *continuation]).log_softmax(-1)
        expected = [float(table[len(TEXT) - 1 + i, token]) for i, token in enumerate(continuation)]
        assert row == pytest.approx(expected, abs=1e-3)
    assert score.usage.computed_tokens == len(TEXT)
    assert score.usage.forwards == 1


async def test_a_choice_costs_one_forward_and_its_probabilities_are_exact(engine: AsyncEngine, model: Any) -> None:
    answer = await engine.complete(request(constraint=Choice(options=('"yes"', '"no"'))))
    assert answer.text in ('"yes"', '"no"')
    assert answer.usage.forwards == 1
    quote, yes, no = (tiny_chat().encode(t)[0] for t in ('"', "y", "n"))
    row = logits(model, [*TEXT, quote])[-1][[yes, no]].softmax(-1).tolist()
    assert answer.choices[0].probabilities == pytest.approx({'"yes"': row[0], '"no"': row[1]}, abs=1e-4)


async def test_a_choice_whose_option_begins_another(engine: AsyncEngine) -> None:
    seen = set()
    for seed in range(12):
        params = {"constraint": Choice(options=("ab", "abc", "x")), "temperature": 3.0, "seed": seed}
        answer = await engine.complete(request(**params))
        seen.add(answer.text)
        assert answer.choices[0].finish_reason == "stop"
    assert seen <= {"ab", "abc", "x"}
    assert len(seen) > 1


async def test_a_regex_and_a_schema_hold_whatever_the_model_likes(engine: AsyncEngine) -> None:
    for seed in range(4):
        pattern = r"[a-c]{2,5}-\d{3}"
        text = (await engine.complete(request(constraint=Regex(pattern=pattern), temperature=2.0, seed=seed))).text
        assert re.fullmatch(pattern, text)
        schema = {
            "type": "object",
            "properties": {
                "grounded": {"type": "boolean"},
                "score": {"type": "integer", "minimum": 0, "maximum": 9},
            },
            "required": ["grounded", "score"],
            "additionalProperties": False,
        }
        constraint = JsonSchema(schema_text=json.dumps(schema))
        done = await engine.complete(request(constraint=constraint, temperature=2.0, seed=seed))
        assert set(json.loads(done.text)) == {"grounded", "score"}
        assert done.usage.forwards < done.usage.completion_tokens / 2, "forced runs are jumped over"


@pytest.mark.parametrize(
    "constraint",
    [
        Regex(pattern="(["),
        JsonSchema(schema_text="{"),
        JsonSchema(schema_text='{"type": "nonsense"}'),
        Choice(options=("",)),
    ],
)
async def test_invalid_constraints_are_refused_and_harm_nobody(engine: AsyncEngine, constraint: Any) -> None:
    good = asyncio.create_task(engine.complete(request(max_tokens=20)))
    with pytest.raises(ConstraintError):
        await engine.complete(request(constraint=constraint))
    assert (await good).usage.completion_tokens > 0


async def test_a_choice_that_cannot_fit_is_refused(engine: AsyncEngine) -> None:
    with pytest.raises(ConstraintError, match="max_tokens is 2"):
        await engine.complete(request(max_tokens=2, constraint=Choice(options=("longer", "no"))))


async def test_stop_strings_cut_the_text_also_across_tokens(engine: AsyncEngine) -> None:
    whole = await engine.complete(request(max_tokens=30, ignore_eos=True))
    stop = whole.text[9:12]
    done = await engine.complete(request(max_tokens=30, ignore_eos=True, stop=(stop,)))
    assert done.text == whole.text[: whole.text.index(stop)]
    assert done.choices[0].finish_reason == "stop"
    pieces = [d async for d in engine.stream(request(max_tokens=30, ignore_eos=True, stop=(stop,)))]
    assert "".join(piece.text for piece in pieces) == done.text


async def test_a_stream_is_the_completion_in_pieces(engine: AsyncEngine) -> None:
    sampled = {"max_tokens": 25, "temperature": 1.0, "seed": 5, "logprobs": True, "top_logprobs": 3, "n": 2}
    whole = await engine.complete(request(**sampled))
    pieces = [delta async for delta in engine.stream(request(**sampled))]
    assert pieces[-1].completion is not None
    for choice in whole.choices:
        mine = [p for p in pieces[:-1] if p.index == choice.index]
        assert "".join(p.text for p in mine) == choice.text
        assert sum((p.token_ids for p in mine), ()) == choice.token_ids
        assert len(sum((p.logprobs for p in mine), ())) == len(choice.token_ids)


async def test_seeds_repeat_and_differ(engine: AsyncEngine) -> None:
    def sampled(seed: int) -> Request:
        return request(max_tokens=15, temperature=1.0, seed=seed, ignore_eos=True)

    one, again, other = await asyncio.gather(*(engine.complete(sampled(s)) for s in (1, 1, 2)))
    assert one.token_ids == again.token_ids != other.token_ids


@given(st.integers(0, 2**32), st.sampled_from(["top_k", "top_p", "min_p"]), st.data())
def test_filters_keep_what_their_definition_says(seed: int, name: str, data: st.DataObject) -> None:
    row = torch.randn(50, generator=torch.Generator().manual_seed(seed)) * 3
    probabilities = row.softmax(-1)
    order = probabilities.argsort(descending=True)
    if name == "top_k":
        k = data.draw(st.integers(1, 50))
        params, allowed = {"top_k": k}, set(order[:k].tolist())
    elif name == "top_p":
        p = data.draw(st.floats(0.05, 0.95))
        before = probabilities[order].cumsum(0) - probabilities[order]
        params, allowed = {"top_p": p}, set(order[before < p].tolist())
    else:
        p = data.draw(st.floats(0.05, 1.0))
        params, allowed = (
            {"min_p": p},
            set((probabilities >= p * probabilities.max()).nonzero()[:, 0].tolist()),
        )
    full = SamplingParams(temperature=1.0, seed=seed, **params)
    generator = make_generator(full, 0)
    assert {choose(row, full, generator) for _ in range(20)} <= allowed


async def test_a_long_chain_of_tokens_and_a_label_beside_it(engine: AsyncEngine) -> None:
    options = ("q" * 1300, "b", "w")
    choice = (await engine.complete(request(constraint=Choice(options=options), max_tokens=1400))).choices[0]
    assert choice.text in options
    assert choice.probabilities is not None
    assert set(choice.probabilities) == set(options)


async def test_choices_are_bounded(engine: AsyncEngine) -> None:
    with pytest.raises(ConstraintError, match="tokens in all"):
        await engine.complete(
            request(constraint=Choice(options=tuple(f"{i:0200}" for i in range(400))), max_tokens=300)
        )


async def test_branches_share_one_compiled_constraint_and_go_their_own_ways(engine: AsyncEngine) -> None:
    params = {"constraint": Regex(pattern="[ab]{8}"), "n": 6, "temperature": 5.0, "seed": 1, "max_tokens": 12}
    texts = [choice.text for choice in (await engine.complete(request(**params))).choices]
    assert all(len(text) == 8 and set(text) <= {"a", "b"} for text in texts)
    assert len(set(texts)) > 1


async def test_an_answer_that_is_forced_whole_claims_no_reuse(engine: AsyncEngine) -> None:
    done = await engine.complete(request(constraint=Choice(options=("yes",)), max_tokens=9))
    assert (done.text, done.usage.forwards) == ("yes", 0)
    assert (done.usage.cached_tokens, done.usage.computed_tokens) == (0, 0)


async def test_a_forced_answer_that_is_cut_short_says_so(engine: AsyncEngine) -> None:
    constraint = JsonSchema(schema_text='{"const": {"answer": "a long text"}}')
    done = await engine.complete(request(constraint=constraint, max_tokens=3))
    assert done.choices[0].finish_reason == "length"
    whole = await engine.complete(request(constraint=constraint, max_tokens=100))
    assert done.text == whole.text[:3]
    assert whole.choices[0].finish_reason == "stop"


async def test_the_end_of_a_constrained_answer_cannot_be_ignored(engine: AsyncEngine) -> None:
    for seed in range(6):
        params = {"constraint": Choice(options=("y", "yy")), "temperature": 9.0, "seed": seed, "ignore_eos": True}
        assert (await engine.complete(request(**params))).text in ("y", "yy")


async def test_an_unsatisfiable_regex_shows_no_inside(engine: AsyncEngine) -> None:
    with pytest.raises(ConstraintError) as found:
        await engine.complete(request(constraint=Regex(pattern="[^\\s\\S]")))
    assert "compute_time" not in str(found.value)


async def test_a_deadline_counts_the_reading_too(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine._reader, "read", lambda *_: time.sleep(0.5))
    with pytest.raises(DeadlineExceeded, match="read"):
        await engine.complete(request().model_copy(update={"deadline_s": 0.05}))


def test_a_callers_loop_that_ends_harms_nobody(model: Any, folders: dict[str, Path]) -> None:
    engine = asyncio.run(loaded(model, folders))

    async def leave() -> None:
        # Kept by nobody: the loop ends and closes while they run.
        tasks = [asyncio.create_task(engine.complete(request(max_tokens=900, ignore_eos=True))) for _ in range(8)]
        while not (await engine.stats()).running:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.05)
        assert tasks

    for _ in range(3):
        asyncio.run(leave())
        assert engine.running
    done = asyncio.run(engine.complete(request(max_tokens=2, ignore_eos=True)))
    assert done.usage.completion_tokens == 2
    asyncio.run(engine.aclose())


@pytest.mark.parametrize("temperature", [5e-324, 1e-40, 1e-10, 10.0])
def test_any_temperature_above_zero_gives_a_distribution(temperature: float) -> None:
    logits = torch.tensor([3.0, 1e30, 5.0, float("-inf")])
    params = SamplingParams(temperature=temperature, seed=1)
    assert choose(logits, params, make_generator(params, 0)) == 1


async def test_a_fault_in_sampling_ends_its_own_request_only(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_for_one(logits: Any, params: SamplingParams, generator: Any) -> int:
        if params.max_tokens == 3:
            raise RuntimeError("a bug")
        return choose(logits, params, generator)

    monkeypatch.setattr("midstream.engine.core.choose", fail_for_one)
    tasks = [engine.complete(request(max_tokens=n, ignore_eos=True)) for n in (3, 5)]
    failed, other = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(failed, ForwardFailed)
    assert len(other.token_ids) == 5


async def test_cancelling_frees_at_once(engine: AsyncEngine) -> None:
    task = asyncio.create_task(engine.complete(request(max_tokens=1500, ignore_eos=True)))
    while not (await engine.stats()).running:
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    stats = await engine.stats()
    assert stats.running == 0
    await engine.clear_cache()
    assert (await engine.stats()).kv_used_bytes == 0


async def test_leaving_a_stream_cancels_it(engine: AsyncEngine) -> None:
    stream = engine.stream(request(max_tokens=1500, ignore_eos=True))
    async for _ in stream:
        break
    await stream.aclose()
    assert (await engine.stats()).running == 0


async def test_a_deadline_ends_a_request_and_no_other(engine: AsyncEngine) -> None:
    late = Request(prompt=TEXT, params=SamplingParams(max_tokens=1900, ignore_eos=True), deadline_s=0.05)
    other = engine.complete(request(max_tokens=30, ignore_eos=True))
    results = await asyncio.gather(engine.complete(late), other, return_exceptions=True)
    assert isinstance(results[0], DeadlineExceeded)
    assert results[1].usage.completion_tokens == 30


async def test_the_queue_is_bounded(model: Any, folders: dict[str, Path]) -> None:
    engine = await loaded(model, folders, max_queued_requests=2, max_running_sequences=1)
    try:
        results = await asyncio.gather(
            *(engine.complete(request(max_tokens=40, ignore_eos=True)) for _ in range(9)),
            return_exceptions=True,
        )
        refused = [r for r in results if isinstance(r, OverloadedError)]
        assert refused
        assert len(refused) + sum(not isinstance(r, BaseException) for r in results) == 9
    finally:
        await engine.aclose()


async def test_closing_ends_running_requests_and_refuses_new_ones(model: Any, folders: dict[str, Path]) -> None:
    engine = await loaded(model, folders)
    task = asyncio.create_task(engine.complete(request(max_tokens=1500, ignore_eos=True)))
    while not (await engine.stats()).running:
        await asyncio.sleep(0.001)
    await engine.aclose()
    with pytest.raises(EngineStopped):
        await task
    with pytest.raises(EngineStopped):
        await engine.complete(request())


async def test_a_failing_forward_ends_its_own_request_and_no_other(engine: AsyncEngine) -> None:
    """The failing one comes first and shares a cold prefix with the others, which must compute it themselves."""
    runner = engine._loop._runner
    run = runner.run

    def fail_for_one(step: Any) -> Any:
        if any(segment.branch.job.params.max_tokens == 3 for segment in step.segments):
            raise RuntimeError("out of memory")
        return run(step)

    expected = await engine.complete(request(max_tokens=5, ignore_eos=True))
    await engine.clear_cache()
    runner.run = fail_for_one
    tasks = [engine.complete(request(max_tokens=n, ignore_eos=True)) for n in (3, 5, 5)]
    failed, *others = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(failed, ForwardFailed)
    assert "out of memory" in str(failed)
    assert [other.token_ids for other in others] == [expected.token_ids] * 2


async def test_a_fault_in_the_loop_itself_leaves_nobody_waiting(model: Any, folders: dict[str, Path]) -> None:
    engine = await loaded(model, folders)

    def fail() -> Any:
        if engine._core.scheduler.waiting:
            raise KeyError("a bug")
        return None  # the loop also comes by here after the calls that loaded the adapters

    engine._core.scheduler.schedule = fail  # type: ignore[method-assign]
    with pytest.raises(EngineStopped, match="a bug"):
        await engine.complete(request())
    with pytest.raises(EngineStopped):
        await engine.stats()
    await engine.aclose()


async def test_64_requests_over_8_conversations_with_cancellations(model: Any, folders: dict[str, Path]) -> None:
    engine = await loaded(model, folders, kv_budget_bytes=700 * 256, max_step_tokens=48, max_running_sequences=16)
    rng = random.Random(4)
    calls = {n: tuple(s["invocation"]) for n, s in SETTINGS.items() if "invocation" in s}
    try:
        tasks = []
        for i in range(64):
            adapter = rng.choice([None, "lora", *calls])
            prompt = (i % 8, *TEXT, *range(rng.randrange(40)), *calls.get(adapter or "", ()))
            params = SamplingParams(max_tokens=rng.randrange(1, 40), n=rng.choice([1, 1, 2]), ignore_eos=True)
            tasks.append(asyncio.create_task(engine.complete(Request(prompt=prompt, adapter=adapter, params=params))))
        for _ in range(20):
            await asyncio.sleep(0.01)
            rng.choice(tasks).cancel()
            await engine.check_integrity()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for result in results:
            assert not isinstance(result, BaseException) or isinstance(result, (asyncio.CancelledError, MidstreamError))
        assert sum(not isinstance(r, BaseException) for r in results) >= 44
        stats = await engine.stats()
        assert (stats.running, stats.queued) == (0, 0)
        await engine.clear_cache()
        assert (await engine.stats()).kv_used_bytes == 0
        await engine.check_integrity()
    finally:
        await engine.aclose()


async def test_500_random_requests_give_typed_errors_only(engine: AsyncEngine) -> None:
    rng = random.Random(7)
    junk = [None, -1, 0, 1, 3, 10**9, 2.5, "", "a", "alora", [], [1, 2], [400], {}, True, float("nan"), ["x"]]
    fields = [
        "max_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "seed",
        "stop",
        "n",
        "constraint",
        "logprobs",
    ]
    outcomes = {"done": 0, "refused": 0}
    for _ in range(500):
        params = {f: rng.choice(junk) for f in rng.sample(fields, rng.randrange(2))}
        body = {
            "prompt": list(TEXT) if rng.random() < 0.8 else rng.choice(junk),
            "params": {"max_tokens": 2, **params},
        }
        body.update({f: rng.choice(junk) for f in rng.sample(["adapter", "invoke", "deadline_s"], rng.randrange(2))})
        try:
            parsed = Request.model_validate(body)
        except ValueError:
            outcomes["refused"] += 1
            continue
        try:
            await engine.complete(parsed)
            outcomes["done"] += 1
        except (InputError, AdapterNotFound, DeadlineExceeded):
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 20
