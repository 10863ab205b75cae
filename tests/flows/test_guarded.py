"""A guarded answer: what is told, when, and what is withheld."""

from __future__ import annotations

import asyncio
import json
from contextlib import aclosing
from typing import Any

import pytest

from midstream.backend import Backend
from midstream.engine.engine import AsyncEngine
from midstream.errors import AdapterNotFound, DeadlineExceeded, ForwardFailed
from midstream.flows.events import Call, Event
from midstream.flows.guarded import Guarded, GuardSettings, guarded
from midstream.flows.run import Run
from midstream.types import Chat, Completion, Message, Request, SamplingParams
from tests.flows.backends import Scripted
from tests.flows.engines import check_idle
from tests.flows.sweeps import cancel_at_every_event, fail_at_every_call

CHAT = Chat(messages=(Message(role="user", content="Tell me."),))
REFUSED, FALLBACK = GuardSettings().refusal, GuardSettings().fallback


def scripted(jailbreak: float = 0.1, met: Any = 0.9, answer: Any = "an answer", **more: Any) -> Scripted:
    def check(prompt: str, request: Request) -> dict[str | int, float]:
        return {"met": met if isinstance(met, float) else next(p for text, p in met.items() if text in prompt)}

    return Scripted({None: answer, "jailbreak": {"yes": jailbreak}, "requirement_check": check}, **more)


async def heard(backend: Backend, settings: GuardSettings, run: Run | None = None) -> tuple[Guarded, list[Event]]:
    events: list[Event] = []
    return await guarded(backend, CHAT, settings, run=run or Run(seed=1, on_event=events.append)), events


def texts(events: list[Event]) -> list[str]:
    return [event.data["text"] for event in events if event.kind == "text"]


@pytest.mark.parametrize("eager", [False, True])
async def test_an_allowed_answer_is_told_as_it_comes(eager: bool) -> None:
    result, events = await heard(scripted(), GuardSettings(eager=eager))
    assert (result.answer, result.outcome, result.withheld, result.error) == ("an answer", "answered", "", None)
    assert result.jailbreak == pytest.approx(0.1)
    assert "".join(texts(events)) == "an answer"
    assert len(texts(events)) > 4
    assert result.transcript.messages[-1].content == "an answer"
    assert result.drawn is not None
    assert result.drawn.tokens_spent > 0
    json.dumps(result.as_dict())


async def test_a_refused_question_is_not_answered() -> None:
    backend = scripted(jailbreak=0.5)
    result, events = await heard(backend, GuardSettings())
    assert (result.answer, result.outcome, result.drawn, result.withheld) == (REFUSED, "refused", None, "")
    assert [request.adapter for request in backend.requests] == ["jailbreak"]
    assert texts(events) == [REFUSED]
    assert result.transcript.messages[-1].content == REFUSED
    assert (await guarded(scripted(jailbreak=0.49), CHAT)).outcome == "answered"


async def test_an_eager_answer_is_cancelled_when_the_guard_refuses_and_nothing_of_it_is_told() -> None:
    came = asyncio.Event()

    async def before(request: Request) -> None:
        if request.adapter == "jailbreak":
            await came.wait()  # some of the answer is there by then

    class Long(Scripted):
        async def stream(self, request: Request) -> Any:
            count = 0
            async with aclosing(super().stream(request)) as deltas:  # type: ignore[type-var]
                async for delta in deltas:
                    yield delta
                    count += 1
                    if request.adapter is None and count == 5:
                        came.set()

    long = Long({None: "long " * 1000, "jailbreak": {"yes": 0.9}}, before=before)
    settings = GuardSettings(eager=True, params=SamplingParams(max_tokens=5000))
    result, events = await heard(long, settings, None)
    assert (result.answer, result.outcome) == (REFUSED, "refused")
    assert texts(events) == [REFUSED]
    assert result.withheld.startswith("long")
    assert result.drawn is not None
    assert result.drawn.finish_reason is None
    assert 5 <= result.drawn.generating_tokens < 5000
    assert long.running == 0


async def test_an_eager_answer_waits_for_the_guard_before_it_is_told() -> None:
    done = asyncio.Event()
    order: list[str] = []

    async def before(request: Request) -> None:
        if request.adapter == "jailbreak":
            await done.wait()

    class Telling(Scripted):
        async def stream(self, request: Request) -> Any:
            async for delta in super().stream(request):
                if request.adapter is None and delta.completion is not None:
                    done.set()  # the answer is whole before the guard has spoken
                yield delta

    backend = Telling({None: "an answer", "jailbreak": {"no": 1.0}}, before=before)
    run = Run(deadline_s=20, on_event=lambda event: order.append(event.kind + " " + event.step))
    result = await guarded(backend, CHAT, GuardSettings(eager=True), run=run)
    assert (result.answer, result.error) == ("an answer", None)
    assert [each for each in order if "text" in each or "decision" in each] == ["decision guard", "text answer"]


@pytest.mark.parametrize("eager", [False, True])
async def test_an_answer_that_fails_a_requirement_is_withheld_and_never_told(eager: bool) -> None:
    settings = GuardSettings(requirements=("Be kind.", "Be brief."), eager=eager)
    result, events = await heard(scripted(met={"Be kind": 0.9, "Be brief": 0.4}), settings)
    assert (result.answer, result.outcome, result.withheld) == (FALLBACK, "withheld", "an answer")
    assert texts(events) == [FALLBACK]
    assert [(v.requirement, v.met) for v in result.verdicts] == [("Be kind.", True), ("Be brief.", False)]
    assert result.transcript.messages[-1].content == FALLBACK
    assert len(result.transcript.messages) == 2


async def test_an_answer_that_meets_all_is_told_in_one_piece() -> None:
    result, events = await heard(scripted(), GuardSettings(requirements=("Be kind.",)))
    assert (result.answer, result.outcome, result.withheld) == ("an answer", "answered", "")
    assert texts(events) == ["an answer"]


async def test_a_failed_requirement_may_be_flagged_only() -> None:
    settings = GuardSettings(requirements=("Be kind.",), unmet="flag")
    result, events = await heard(scripted(met=0.1), settings)
    assert (result.answer, result.outcome, result.withheld) == ("an answer", "flagged", "")
    assert len(texts(events)) > 4, "what cannot be withheld is told as it comes"
    assert result.transcript.messages[-1].content == "an answer"


async def test_without_a_guard_only_requirements_are_checked() -> None:
    backend = Scripted({None: "x", "requirement_check": {"met": 0.9}})
    result = await guarded(backend, CHAT, GuardSettings(guard=None, eager=True, requirements=("a",)))
    assert (result.outcome, result.jailbreak, result.error) == ("answered", None, None)


async def test_a_missing_adapter_is_named_before_anything_is_told() -> None:
    for adapters in ([], ["jailbreak"], ["requirement_check"]):
        backend = scripted(adapters=adapters)
        result, events = await heard(backend, GuardSettings(requirements=("a",), eager=True))
        assert isinstance(result.error, AdapterNotFound)
        assert (result.outcome, result.answer, texts(events), backend.requests) == ("stopped", "", [], [])


async def test_an_eager_answer_that_fails_matters_only_where_it_is_wanted() -> None:
    error = ForwardFailed("broken")
    refused = await guarded(scripted(jailbreak=0.9, answer=error), CHAT, GuardSettings(eager=True))
    assert (refused.outcome, refused.error) == ("refused", None)
    allowed = await guarded(scripted(answer=error), CHAT, GuardSettings(eager=True))
    assert (allowed.outcome, allowed.error) == ("stopped", error)


@pytest.mark.parametrize("eager", [False, True])
async def test_a_deadline_ends_guard_and_answer(eager: bool) -> None:
    async def before(request: Request) -> None:
        if request.adapter is not None:
            await asyncio.sleep(3600)

    backend = scripted(before=before)
    result = await guarded(backend, CHAT, GuardSettings(eager=eager), run=Run(deadline_s=0.2))
    assert isinstance(result.error, DeadlineExceeded)
    assert (result.outcome, result.answer, backend.running) == ("stopped", "", 0)
    assert result.withheld == ("an answer" if eager else "")


# ---------------------------------------------------------------------- wherever it is stopped


def flow(unmet: Any, eager: bool) -> Any:
    async def answered(backend: Backend, run: Run) -> Guarded:
        settings = GuardSettings(
            guard=1.0,
            requirements=("Be kind.", "Be brief."),
            unmet=unmet,
            eager=eager,
            params=SamplingParams(max_tokens=10),
        )
        return await guarded(backend, CHAT, settings, run=run)

    return answered


def finished(call: Call) -> bool:
    return isinstance(call.outcome, Completion)


def check_found(result: Guarded, whole: Guarded) -> None:
    """What was told is what may be told: nothing that could still be withheld."""
    assert whole.drawn is not None
    if result.drawn is not None:
        assert whole.drawn.text.startswith(result.drawn.text)
    if result.outcome == "stopped":
        assert whole.answer.startswith(result.answer)
        assert result.transcript.messages in (CHAT.messages, ())
    expected = {verdict.requirement: verdict.met for verdict in whole.verdicts}
    assert all(verdict.met == expected[verdict.requirement] for verdict in result.verdicts)
    assert len(result.verdicts) == sum(call.step.startswith("judge") for call in result.calls if finished(call))


@pytest.mark.parametrize("unmet", ["flag", "fallback"])
@pytest.mark.parametrize("eager", [False, True])
async def test_it_may_be_stopped_anywhere(unmet: str, eager: bool) -> None:
    whole, stopped = await fail_at_every_call(flow(unmet, eager), lambda: scripted(met=0.2))
    cancelled = await cancel_at_every_event(flow(unmet, eager), lambda: scripted(met=0.2))
    for result in stopped + cancelled:
        check_found(result, whole)
        if unmet == "fallback":
            assert result.answer in ("", FALLBACK)


@pytest.mark.parametrize("unmet", ["flag", "fallback"])
@pytest.mark.parametrize("eager", [False, True])
async def test_an_engine_is_left_idle_wherever_it_is_stopped(engine: AsyncEngine, unmet: str, eager: bool) -> None:
    whole, stopped = await fail_at_every_call(flow(unmet, eager), lambda: engine, lambda: check_idle(engine))
    stopped += await cancel_at_every_event(flow(unmet, eager), lambda: engine, lambda: check_idle(engine))
    for result in stopped:
        check_found(result, whole)


async def test_an_engine_is_left_idle_by_a_refused_eager_answer(engine: AsyncEngine) -> None:
    long = SamplingParams(max_tokens=1500, temperature=1.0, ignore_eos=True)
    result = await guarded(engine, CHAT, GuardSettings(guard=0.0, eager=True, params=long))
    assert (result.outcome, result.error, result.answer) == ("refused", None, REFUSED)
    assert result.drawn is not None
    assert len(result.drawn.token_ids) < 1500
    await check_idle(engine)
