"""Instruct, validate, repair."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest
from pydantic import ValidationError

from midstream.backend import Backend
from midstream.engine.engine import AsyncEngine
from midstream.errors import AdapterNotFound, BudgetExceeded, DeadlineExceeded, InputError
from midstream.flows.repair import Repair, RepairSettings, repair
from midstream.flows.requirements import Requirement
from midstream.flows.run import Run
from midstream.types import Chat, Message, Request, SamplingParams
from tests.flows.backends import Scripted, text_of
from tests.flows.engines import check_idle
from tests.flows.sweeps import cancel_at_every_event, ended, fail_at_every_call
from tests.tiny import tiny_chat

CHAT = Chat(messages=(Message(role="user", content="Greet {name}."),))
SHORT = Requirement("at most five letters", lambda text: len(text) <= 5)
KIND = Requirement("Be kind.")
AGAIN = RepairSettings(repair="resample", params=SamplingParams(temperature=1.0, max_tokens=64))


def scripted(*answers: str, kind: Any = None) -> Scripted:
    """A checker that finds an answer kind which has a heart."""

    def heart(prompt: str, request: Request) -> dict[str | int, float]:
        answer = prompt.rsplit("assistant: ", 1)[1].split("\x03")[0]
        return {"met": 0.9 if "♥" in answer else 0.2}

    return Scripted({None: answers, "requirement_check": kind or heart})


def prompts(backend: Scripted, adapter: str | None) -> list[str]:
    found = [request.prompt for request in backend.requests if request.adapter == adapter]
    return [text_of(prompt) for prompt in found if isinstance(prompt, tuple)]


async def test_an_answer_that_meets_all_is_taken_at_once() -> None:
    backend = scripted("hi ♥")
    result = await repair(backend, CHAT, [SHORT, KIND])
    assert (result.met, result.text, len(result.attempts), result.error) == (True, "hi ♥", 1, None)
    found = result.attempts[0].verdicts
    assert [(v.requirement, v.met, v.probability, v.judge) for v in found] == [
        ("at most five letters", True, 1.0, "check"),
        ("Be kind.", True, 0.9, "requirement_check"),
    ]
    assert result.decisions[-1].outcome == "met"
    json.dumps(result.as_dict())


async def test_what_failed_is_named_behind_the_answer_and_the_kv_is_reused() -> None:
    backend = scripted("good morning", "good day ♥", "hi ♥")
    result = await repair(backend, CHAT, [SHORT, KIND])
    assert [[v.met for v in attempt.verdicts] for attempt in result.attempts] == [
        [False, False],
        [False, True],
        [True, True],
    ]
    assert result.best == result.attempts[2]
    asked = prompts(backend, None)
    assert asked[1].startswith("user: Greet {name}.\x03assistant: good morning\x03user: ")
    assert "- at most five letters\n- Be kind.\n" in asked[1]
    last = asked[2].rsplit("user: ", 1)[1]
    assert "- at most five letters\n" in last
    assert "Be kind." not in last
    drawn = [call for call in result.calls if call.request.adapter is None]
    for call, before in zip(drawn[1:], asked, strict=False):
        assert call.usage.cached_tokens >= len(before), "all that was computed is reused"
    assert len(result.transcript.messages) == 6
    assert sum(attempt.tokens_spent for attempt in result.attempts) == result.tokens_spent


async def test_resampling_asks_the_same_again_with_other_seeds() -> None:
    backend = scripted("good morning", "hi ♥")
    result = await repair(backend, CHAT, [SHORT, KIND], AGAIN, run=Run(seed=3))
    assert (result.text, len(result.attempts)) == ("hi ♥", 2)
    first, second = prompts(backend, None)
    assert first == second
    assert len({attempt.seed for attempt in result.attempts}) == 2
    assert len(result.transcript.messages) == 2


async def test_without_success_the_best_attempt_is_told() -> None:
    result = await repair(scripted("good day", "good day ♥", "hi"), CHAT, [SHORT, KIND])
    assert (result.met, result.error, len(result.attempts)) == (False, None, 3)
    assert [attempt.num_met for attempt in result.attempts] == [0, 1, 1]
    assert [attempt.probability for attempt in result.attempts] == pytest.approx([0.1, 0.45, 0.6])
    assert result.text == "hi", "of as many that are met, the higher probability"
    alike = await repair(scripted("one", "two"), CHAT, [KIND], RepairSettings(attempts=2))
    assert alike.text == "one"


async def test_the_threshold_decides() -> None:
    settings = RepairSettings(attempts=1, threshold=0.2)
    assert (await repair(scripted("x"), CHAT, [KIND], settings)).met
    assert not (await repair(scripted("x"), CHAT, [KIND], settings.model_copy(update={"threshold": 0.21}))).met


async def test_the_requirements_of_an_attempt_are_judged_together() -> None:
    waiting = 0
    all_there = asyncio.Event()

    async def before(request: Request) -> None:
        nonlocal waiting
        if request.adapter is not None:
            waiting += 1
            if waiting == 3:
                all_there.set()
            await all_there.wait()

    backend = scripted("♥")
    backend.before = before
    needs = [Requirement(text) for text in ("one", "two", "three")]
    result = await repair(backend, CHAT, needs, run=Run(deadline_s=20))
    assert (result.met, result.error) == (True, None)
    assert [v.requirement for v in result.attempts[0].verdicts] == ["one", "two", "three"]


async def test_what_is_wrong_with_a_requirement_is_named() -> None:
    async def later(text: str) -> bool:
        return True

    cases: list[tuple[Sequence[Requirement], str]] = [
        ([], "at least one"),
        ([Requirement("  ")], "no text"),
        ([Requirement("a number", lambda text: int(text) > 0)], "requirement 'a number' failed: ValueError"),
        ([Requirement("late", later)], "'late' is a coroutine function"),  # type: ignore[arg-type]
    ]
    for needs, message in cases:
        result = await repair(scripted("x"), CHAT, needs)
        assert isinstance(result.error, InputError)
        assert message in str(result.error)
        assert not result.met
        assert result.best is None
    assert result.attempts[0].text == "x"
    assert result.attempts[0].error is result.error


async def test_the_intrinsic_is_needed_only_where_there_is_no_check() -> None:
    bare = Scripted({None: "hi"})
    assert (await repair(bare, CHAT, [SHORT])).met
    result = await repair(bare, CHAT, [SHORT, KIND])
    assert isinstance(result.error, AdapterNotFound)
    assert not result.attempts


def test_settings_are_checked() -> None:
    for wrong in (
        {"attempts": 0},
        {"threshold": 1.1},
        {"instruction": "again"},
        {"repair": "resample"},
        {"params": SamplingParams(n=2)},
    ):
        with pytest.raises(ValidationError):
            RepairSettings.model_validate(wrong)
    assert RepairSettings(repair="resample", attempts=1).attempts == 1


async def test_limits_end_it_beside_what_was_found() -> None:
    backend = scripted("good morning")
    spent = await repair(backend, CHAT, [SHORT], run=Run(max_tokens=20))
    assert isinstance(spent.error, BudgetExceeded)
    assert [len(attempt.verdicts) for attempt in spent.attempts] == [1, 0]
    assert spent.text == "good morning"
    drawn = 0

    async def before(request: Request) -> None:
        nonlocal drawn
        drawn += 1
        if drawn == 2:
            await asyncio.sleep(3600)

    backend = scripted("good morning")
    backend.before = before
    late = await repair(backend, CHAT, [SHORT], run=Run(deadline_s=0.3))
    assert isinstance(late.error, DeadlineExceeded)
    assert [attempt.finish_reason for attempt in late.attempts] == ["stop", None]
    assert (late.text, late.met, backend.running) == ("good morning", False, 0)


# ---------------------------------------------------------------------- wherever it is stopped


async def repaired(backend: Backend, run: Run) -> Repair:
    never = Requirement("never", lambda text: False)
    settings = RepairSettings(attempts=2, params=SamplingParams(max_tokens=10))
    return await repair(backend, CHAT, [KIND, never, Requirement("x")], settings, run=run)


async def resampled(backend: Backend, run: Run) -> Repair:
    never = Requirement("never", lambda text: False)
    settings = RepairSettings(attempts=2, repair="resample", params=SamplingParams(max_tokens=10, temperature=1.0))
    return await repair(backend, CHAT, [KIND, never], settings, run=run)


def check_found(result: Repair, whole: Repair) -> None:
    assert sum(a.finish_reason is not None for a in result.attempts) == ended(result, judged=False)
    judged = [v for a in result.attempts for v in a.verdicts if v.judge == "requirement_check"]
    assert len(judged) == ended(result, judged=True)
    for attempt, same in zip(result.attempts, whole.attempts, strict=False):
        assert same.text.startswith(attempt.text)
        assert {v.requirement for v in attempt.verdicts} <= {v.requirement for v in same.verdicts}
    full = [a for a in result.attempts if len(a.verdicts) == len(whole.attempts[0].verdicts)]
    assert (result.best is None) == (not full)


@pytest.mark.parametrize("flow", [repaired, resampled])
async def test_it_may_be_stopped_anywhere(flow: Any) -> None:
    whole, stopped = await fail_at_every_call(flow, lambda: scripted("good morning", "hi"))
    stopped += await cancel_at_every_event(flow, lambda: scripted("good morning", "hi"))
    for result in stopped:
        check_found(result, whole)


@pytest.mark.parametrize("flow", [repaired, resampled])
async def test_an_engine_is_left_idle_wherever_it_is_stopped(engine: AsyncEngine, flow: Any) -> None:
    whole, stopped = await fail_at_every_call(flow, lambda: engine, lambda: check_idle(engine))
    stopped += await cancel_at_every_event(flow, lambda: engine, lambda: check_idle(engine))
    for result in stopped:
        check_found(result, whole)


async def test_on_an_engine_a_repair_reads_what_is_new_and_nothing_else(engine: AsyncEngine) -> None:
    result = await repaired(engine, Run(seed=1))
    result.raise_for_error()
    first, second = [call for call in result.calls if call.request.adapter is None]
    assert not isinstance(first.request.prompt, Chat)
    assert not isinstance(second.request.prompt, Chat)
    # The turn's end was read for the judges, and so was the header of a user turn, with which an instruction begins.
    transcript = result.attempts[0].transcript
    assert transcript is not None
    assert second.request.prompt[: len(transcript.tokens)] == transcript.tokens
    header = len(tiny_chat().encode("<|im_start|>user\n"))
    assert second.usage.computed_tokens == len(second.request.prompt) - len(transcript.tokens) - header
    judged = [call for call in result.calls if call.step.startswith("judge 0 ")]
    invocation = len(tiny_chat().encode("<|im_start|>requirement_check\n"))
    asked = [call.outcome.prompt_token_ids for call in judged]  # type: ignore[union-attr]
    own = [len(prompt) - len(transcript.tokens) for prompt in asked]
    shared = len(tiny_chat().encode("<|im_start|>user\nRequirement: "))
    turn_end = len(transcript.tokens) - len(first.request.prompt) - 9  # nine tokens of the answer have KV
    assert sum(call.usage.computed_tokens for call in judged) == turn_end + sum(own) - shared
    assert all(each > invocation + shared for each in own)
