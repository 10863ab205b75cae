"""Best of n: by a script, and on a tiny engine where every token is accounted for."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from midstream.backend import Backend
from midstream.engine.engine import AsyncEngine
from midstream.errors import (
    AdapterNotFound,
    BudgetExceeded,
    Cancelled,
    DeadlineExceeded,
    ForwardFailed,
    InputError,
    OutputError,
)
from midstream.flows.best_of_n import BestOfN, BestOfNSettings, best_of_n
from midstream.flows.run import Run
from midstream.transcript import Transcript
from midstream.types import Chat, Document, Message, Request, SamplingParams
from tests.flows.backends import Failing, Scripted, text_of
from tests.flows.engines import check_idle
from tests.flows.sweeps import cancel_at_every_event, ended, fail_at_every_call
from tests.tiny import tiny_chat

PASSAGE = Document(text="The lamp is blue.", title="Lamps")
CHAT = Chat(messages=(Message(role="user", content="What colour is the lamp?", documents=(PASSAGE,)),))
BARE = Chat(messages=(Message(role="user", content="hello"),))
SHORT = SamplingParams(max_tokens=12, temperature=1.0)
BYTES_PER_SLOT = 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, dimensions, float32


def by_seed(prompt: str, request: Request) -> str:
    """An answer that its seed decides, like a model's."""
    return f"answer {request.params.seed or 0:x}"[:12]


def grades(share: Callable[[str], float]) -> Callable[[str, Request], dict[str | int, float]]:
    """Groundedness by the text of the answer."""

    def script(prompt: str, request: Request) -> dict[str | int, float]:
        answer = prompt.rsplit("assistant: ", 1)[1].split("\x03")[0]
        return {"grounded": share(answer)}

    return script


def scripted(answers: Any = by_seed, share: Callable[[str], float] = lambda text: 0.5, **more: Any) -> Scripted:
    return Scripted({None: answers, "hallucination": grades(share), "certainty": {5: 1.0}}, **more)


# ---------------------------------------------------------------------- what is chosen


async def test_the_best_by_weighted_mean_is_taken() -> None:
    shares = {"bad": 0.1, "good": 0.9, "fair": 0.5}
    backend = scripted(["bad", "good", "fair"], shares.__getitem__)
    settings = BestOfNSettings(n=3, weights={"hallucination": 3, "certainty": 1})
    result = await best_of_n(backend, CHAT, settings)
    assert (result.text, result.stopped, result.error) == ("good", "all", None)
    assert [c.text for c in result.candidates] == ["bad", "good", "fair"]
    assert result.best == result.candidates[1]
    for candidate in result.candidates:
        assert candidate.scores == {"hallucination": pytest.approx(shares[candidate.text]), "certainty": 0.55}
        assert candidate.score == pytest.approx((3 * shares[candidate.text] + 0.55) / 4)
        assert candidate.transcript is not None
        assert text_of(candidate.transcript.tokens).endswith(f"assistant: {candidate.text}\x03")
        assert candidate.finish_reason == "stop"
    assert result.transcript.messages[-1].content == "good"
    assert result.decisions[-1].outcome == "answer 1"


async def test_on_a_tie_the_first_is_taken() -> None:
    result = await best_of_n(scripted(["x", "one", "two"], lambda text: 0.2 if text == "x" else 0.7), CHAT)
    assert result.best is not None
    assert result.best.index == 1


async def test_without_documents_there_is_no_groundedness_and_a_decision_says_so() -> None:
    backend = scripted()
    result = await best_of_n(backend, BARE, BestOfNSettings(n=2))
    assert [c.scores for c in result.candidates] == [{"certainty": 0.55}] * 2
    assert "no documents" in result.decisions[0].reason
    assert not [request for request in backend.requests if request.adapter == "hallucination"]
    alone = await best_of_n(scripted(), BARE, BestOfNSettings(n=2, weights={"hallucination": 1}))
    assert isinstance(alone.error, InputError)
    assert "no scorer" in str(alone.error)


async def test_a_requirement_is_a_scorer() -> None:
    backend = Scripted({None: ["a", "bb"], "requirement_check": lambda prompt, _: {"met": float("bb" in prompt)}})
    settings = BestOfNSettings(n=2, weights={"requirement_check": 1}, requirement="two letters")
    result = await best_of_n(backend, BARE, settings)
    assert result.text == "bb"
    assert "Requirement: two letters" in text_of(backend.requests[-1].prompt)  # type: ignore[arg-type]


async def test_a_callers_own_scorer_counts_by_its_weight_and_its_calls_are_the_candidates() -> None:
    async def length(backend: Backend, answered: Transcript) -> float:
        await backend.score(Request(prompt=answered.tokens), [(33,), (34,)])
        return len(answered.messages[-1].content)

    backend = Scripted({None: ["four", "sixsix", "x"]}, adapters=[])
    settings = BestOfNSettings(n=3, weights={"length": 2.0})
    result = await best_of_n(backend, BARE, settings, scorers={"length": length})
    assert result.text == "sixsix"
    assert [c.score for c in result.candidates] == [4, 6, 1]
    assert sum(c.tokens_spent for c in result.candidates) == result.tokens_spent
    assert all(c.judging_tokens > 2 for c in result.candidates)


async def test_a_weight_of_zero_is_told_and_not_counted() -> None:
    backend = scripted(["a", "b"], lambda text: 0.25)
    result = await best_of_n(backend, CHAT, BestOfNSettings(n=2, weights={"hallucination": 1, "certainty": 0}))
    assert result.candidates[0].scores["certainty"] == 0.55
    assert result.candidates[0].score == pytest.approx(0.25)


async def test_misuse_of_scorers_is_named() -> None:
    async def broken(backend: Backend, answered: Transcript) -> float:
        raise KeyError("x")

    async def endless(backend: Backend, answered: Transcript) -> float:
        return float("nan")

    def settings(name: str) -> BestOfNSettings:
        return BestOfNSettings(n=1, weights={name: 1})

    for own, weights, message in (
        ({}, settings("other"), "no scorer 'other'"),
        ({"broken": broken}, settings("certainty"), "'broken' has no weight"),
        ({"certainty": broken}, settings("certainty"), "name of a built-in"),
        ({"broken": broken}, settings("broken"), "'broken' failed: KeyError"),
        ({"endless": endless}, settings("endless"), "no finite number"),
    ):
        result = await best_of_n(scripted(), CHAT, weights, scorers=own)
        assert isinstance(result.error, InputError), message
        assert message in str(result.error)
        assert result.best is None


def test_settings_are_checked() -> None:
    for wrong in (
        {"n": 0},
        {"n": 129},
        {"at_once": 0},
        {"params": SamplingParams(n=2)},
        {"params": SamplingParams(seed=3)},
        {"weights": {}},
        {"weights": {"certainty": -1}},
        {"weights": {"certainty": float("inf")}},
        {"requirement": "x"},
        {"weights": {"requirement_check": 1}},
        {"good_enough": float("nan")},
    ):
        with pytest.raises(ValidationError):
            BestOfNSettings.model_validate(wrong)


async def test_a_missing_adapter_is_named_before_anything_is_drawn() -> None:
    backend = scripted(adapters=["hallucination"])
    result = await best_of_n(backend, CHAT)
    assert isinstance(result.error, AdapterNotFound)
    assert "certainty" in str(result.error)
    assert not backend.requests
    assert (result.best, result.text, result.stopped, result.candidates) == (None, "", None, ())
    assert result.transcript.messages == CHAT.messages


async def test_a_result_is_json_and_its_curve_grows() -> None:
    result = await best_of_n(scripted(["a", "b", "c"], {"a": 0.5, "b": 0.2, "c": 0.8}.__getitem__), CHAT)
    shown = json.loads(json.dumps(result.as_dict()))
    assert [each["text"] for each in shown["candidates"]][:3] == ["a", "b", "c"]
    assert shown["best"] == 2
    points = result.curve()
    assert [point.n for point in points] == list(range(1, 9))
    scores = [c.score for c in result.candidates]
    assert [p.score for p in points[:3]] == [scores[0], scores[0], scores[2]]
    assert points[-1].tokens == result.tokens_spent
    assert all(a.tokens < b.tokens for a, b in itertools.pairwise(points))


# ---------------------------------------------------------------------- waves


async def test_a_good_enough_answer_ends_the_drawing_after_its_wave() -> None:
    backend = scripted(["a", "b", "good", "c", "d"], lambda text: 0.9 if text == "good" else 0.1)
    settings = BestOfNSettings(n=8, weights={"hallucination": 1}, good_enough=0.8, at_once=2)
    result = await best_of_n(backend, CHAT, settings)
    assert (result.stopped, result.text, len(result.candidates)) == ("good_enough", "good", 4)
    assert all(c.score is not None for c in result.candidates), "the wave of the good one is whole"
    assert [d.outcome for d in result.decisions] == ["good_enough", "answer 2"]
    assert settings.wave == 2
    assert BestOfNSettings(n=8, good_enough=0.8).wave == 4
    assert BestOfNSettings(n=8).wave == 8
    late = await best_of_n(
        scripted(["a", "good"], lambda text: float(text == "good")), CHAT, settings.model_copy(update={"n": 2})
    )
    assert late.stopped == "all"


async def test_a_wave_decodes_together_and_is_scored_while_others_decode() -> None:
    judged = asyncio.Event()
    answers = 0

    async def before(request: Request) -> None:
        nonlocal answers
        if request.adapter is not None:
            judged.set()
        else:
            answers += 1
            if answers == 3:
                await judged.wait()  # the third answer waits until another one is being scored

    backend = scripted(before=before)
    result = await best_of_n(backend, CHAT, BestOfNSettings(n=3), run=Run(deadline_s=20))
    assert result.error is None
    assert [request.adapter for request in backend.requests][:3] == [None] * 3


async def test_what_comes_out_depends_on_the_seed_and_not_on_timing() -> None:
    share = lambda text: int(text[-2:], 16) / 255  # noqa: E731
    seen = []
    for size in (1, 2, 3, 7, None):
        chance = random.Random(size)

        async def before(request: Request, chance: random.Random = chance) -> None:
            for _ in range(chance.randrange(20)):
                await asyncio.sleep(0)

        settings = BestOfNSettings(n=7, at_once=size)
        result = await best_of_n(scripted(share=share, before=before), CHAT, settings, run=Run(seed=3))
        seen.append([(c.index, c.seed, c.text, dict(c.scores), c.score) for c in result.candidates])
    assert all(each == seen[0] for each in seen)
    assert len({text for _, _, text, _, _ in seen[0]}) == 7
    other = await best_of_n(scripted(share=share), CHAT, BestOfNSettings(n=7), run=Run(seed=4))
    assert not {c.text for c in other.candidates} & {text for _, _, text, _, _ in seen[0]}


async def test_the_budget_is_looked_at_between_waves() -> None:
    settings = BestOfNSettings(n=20, at_once=5, params=SHORT)
    free = await best_of_n(scripted(), CHAT, settings, run=Run(seed=3))
    cost = max(len(c.token_ids) + c.judging_tokens for c in free.candidates)
    budget = free.curve()[4].tokens + 2 * cost  # room for a wave of two
    result = await best_of_n(scripted(), CHAT, settings, run=Run(seed=3, max_tokens=budget))
    assert (result.stopped, result.error) == ("budget", None)
    assert len(result.candidates) == 7
    assert all(c.score is not None for c in result.candidates), "a wave that has begun is brought to its end"
    assert [c.text for c in result.candidates] == [c.text for c in free.candidates[:7]]
    assert result.decisions[-2].outcome == "budget"


async def test_a_wave_is_sized_by_what_answers_cost_with_their_judging() -> None:
    settings = BestOfNSettings(n=128, at_once=8, params=SamplingParams(max_tokens=13, temperature=1.0))
    run = Run(seed=3, max_tokens=1000)
    result = await best_of_n(scripted(), CHAT, settings, run=run)
    assert (result.stopped, result.error) == ("budget", None)
    most = max(c.tokens_spent for c in result.candidates[1:])
    assert most > 13, "an answer costs more than its own tokens"
    assert 1000 <= result.tokens_spent < 1000 + most


async def test_a_small_budget_has_room_for_one_and_none_for_none() -> None:
    one = await best_of_n(scripted(), CHAT, run=Run(max_tokens=1))
    assert (one.stopped, len(one.candidates)) == ("budget", 1)
    none = await best_of_n(scripted(), CHAT, run=Run(max_tokens=0))
    assert isinstance(none.error, BudgetExceeded)
    assert (none.stopped, none.candidates) == (None, ())


# ---------------------------------------------------------------------- what goes wrong


async def test_an_answer_that_fails_loses_no_other_of_its_wave() -> None:
    error = OutputError("no label")
    for script in ({None: ["a", error, "c"]}, {"hallucination": [{"grounded": 0.5}, error, {"grounded": 0.6}]}):
        backend = scripted(["a", "b", "c"])
        backend.scripts |= script  # type: ignore[arg-type]
        result = await best_of_n(backend, CHAT, BestOfNSettings(n=6, at_once=3))
        assert result.error is error
        assert len(result.candidates) == 3, "no further wave"
        failed = [c for c in result.candidates if c.error is not None]
        assert [(c.error, c.score) for c in failed] == [(error, None)]
        assert sum(c.score is not None for c in result.candidates) == 2
        assert result.best is not None
        assert result.stopped is None
        assert backend.running == 0


async def sampled(backend: Backend, run: Run) -> BestOfN:
    return await best_of_n(backend, CHAT, BestOfNSettings(n=3, at_once=2, params=SHORT), run=run)


def check_found(result: BestOfN, whole: BestOfN) -> None:
    """All that calls had found is there, and it is what a whole run finds."""
    assert sum(c.finish_reason is not None for c in result.candidates) == ended(result, judged=False)
    assert sum(len(c.scores) for c in result.candidates) == ended(result, judged=True)
    for candidate, same in zip(result.candidates, whole.candidates, strict=False):
        assert same.text.startswith(candidate.text)
        if candidate.finish_reason is not None:
            assert candidate.token_ids == same.token_ids
        assert all(score == pytest.approx(same.scores[name], abs=1e-4) for name, score in candidate.scores.items())
    scored = [c for c in result.candidates if c.score is not None]
    assert (result.best is None) == (not scored)


async def test_a_failure_at_any_call_is_the_results_error_beside_what_was_found() -> None:
    whole, stopped = await fail_at_every_call(sampled, scripted)
    assert len(stopped) > 15
    for result in stopped:
        check_found(result, whole)
    assert max(sum(c.score is not None for c in result.candidates) for result in stopped) == 2


async def test_it_can_be_cancelled_at_any_event() -> None:
    whole = await sampled(scripted(), Run(seed=7))
    stopped = await cancel_at_every_event(sampled, scripted)
    assert len(stopped) > 40
    for result in stopped:
        check_found(result, whole)


async def test_a_deadline_gives_back_what_there_is() -> None:
    drawn = 0

    async def before(request: Request) -> None:
        nonlocal drawn
        drawn += request.adapter is None
        if drawn > 2:
            await asyncio.sleep(3600)

    backend = scripted(before=before)
    result = await best_of_n(backend, CHAT, BestOfNSettings(n=4, at_once=2), run=Run(deadline_s=0.5))
    assert isinstance(result.error, DeadlineExceeded)
    assert [c.score is not None for c in result.candidates] == [True, True, False, False]
    assert [c.finish_reason for c in result.candidates] == ["stop", "stop", None, None]
    assert result.best is not None
    assert backend.running == 0


# ---------------------------------------------------------------------- on an engine


def tokens(text: str) -> int:
    return len(tiny_chat().encode(text))


async def test_candidates_share_the_prompt_and_a_score_computes_its_invocation(engine: AsyncEngine) -> None:
    settings = BestOfNSettings(n=5, params=SamplingParams(max_tokens=80, temperature=1.0, ignore_eos=True))
    before = (await engine.stats()).kv_used_bytes
    result = await best_of_n(engine, CHAT, settings, run=Run(seed=5))
    result.raise_for_error()
    prompt = len(await result.conversation.prompt(engine))
    drawn = [call for call in result.calls if call.request.adapter is None]
    # Each answer computes the last token of the prompt for itself, to sample from.
    assert sum(call.usage.computed_tokens for call in drawn) == prompt - 1 + settings.n
    invocations = {name: tokens(f"<|im_start|>{name}\n") for name in ("hallucination", "certainty")}
    kept = 0
    for candidate in result.candidates:
        assert candidate.transcript is not None
        closing = len(candidate.transcript.tokens) - prompt - len(candidate.token_ids)
        judged = [call for call in result.calls if call.step.startswith(f"judge {candidate.index} ")]
        # The answer's last token was sampled and never read.
        assert sum(call.usage.computed_tokens for call in judged) == 1 + closing + sum(invocations.values())
        assert candidate.judging_tokens < candidate.generating_tokens
        kept += len(candidate.token_ids) + closing + sum(invocations.values())
        kept += sum(call.usage.completion_tokens for call in judged)
    used = (await engine.stats()).kv_used_bytes - before
    assert used <= (prompt + kept) * BYTES_PER_SLOT < (settings.n * prompt + kept) * BYTES_PER_SLOT
    assert sum(c.tokens_spent for c in result.candidates) == result.tokens_spent


async def test_on_an_engine_a_seed_gives_the_same_candidates_in_waves_of_any_size(engine: AsyncEngine) -> None:
    runs = []
    for size in (None, 1, 2, 4):
        settings = BestOfNSettings(n=5, at_once=size, params=SHORT)
        runs.append(await best_of_n(engine, CHAT, settings, run=Run(seed=11)))
    for run in runs:
        assert [c.token_ids for c in run.candidates] == [c.token_ids for c in runs[0].candidates]
        assert [c.score for c in run.candidates] == pytest.approx([c.score for c in runs[0].candidates], abs=1e-4)
    assert len({c.token_ids for c in runs[0].candidates}) == 5
    one = runs[0].candidates[3]
    again = await engine.complete(
        Request(prompt=await runs[0].conversation.prompt(engine), params=SHORT.model_copy(update={"seed": one.seed}))
    )
    assert again.token_ids == one.token_ids


async def test_an_engine_is_left_idle_by_a_failure_at_any_call(engine: AsyncEngine) -> None:
    whole, stopped = await fail_at_every_call(sampled, lambda: engine, lambda: check_idle(engine))
    for result in stopped:
        check_found(result, whole)


async def test_an_engine_is_left_idle_by_a_cancellation_at_any_event(engine: AsyncEngine) -> None:
    whole = await sampled(engine, Run(seed=7))
    for result in await cancel_at_every_event(sampled, lambda: engine, lambda: check_idle(engine)):
        check_found(result, whole)


async def test_an_engine_is_left_idle_by_a_deadline_and_by_a_stream_that_breaks(engine: AsyncEngine) -> None:
    long = SamplingParams(max_tokens=1500, temperature=1.0, ignore_eos=True)
    late = await best_of_n(engine, CHAT, BestOfNSettings(n=2, params=long), run=Run(deadline_s=0.2))
    assert isinstance(late.error, DeadlineExceeded)
    assert all(len(c.token_ids) < 1500 for c in late.candidates)
    await check_idle(engine)
    counting = Failing(engine, None)
    await sampled(counting, Run(seed=7))
    broken = Failing(engine, counting.calls.index("stream"), deltas=2)
    result = await sampled(broken, Run(seed=7))
    assert isinstance(result.error, ForwardFailed)
    assert result.candidates[0].token_ids
    assert result.candidates[0].finish_reason is None
    assert result.candidates[1].score is not None


async def test_cancelled_before_it_begins() -> None:
    run = Run()
    run.cancel()
    result = await best_of_n(scripted(), CHAT, run=run)
    assert isinstance(result.error, Cancelled)
    assert result.candidates == ()
