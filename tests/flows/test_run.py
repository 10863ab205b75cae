"""The run of a flow: its limits, its record, and how it ends whatever stops it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass

import pytest

from midstream.backend import Backend
from midstream.errors import BudgetExceeded, Cancelled, DeadlineExceeded, ForwardFailed, MidstreamError
from midstream.flows.events import NO_USAGE, Call, Decision, Event, total
from midstream.flows.run import FlowResult, Run
from midstream.together import together
from midstream.types import AdapterInfo, Chat, Completion, Message, Request, Score, Usage
from tests.flows.backends import Failing, Scripted

ASKED = Request(prompt=tuple(map(ord, "user: hello\x03assistant: ")))
CHAT = Chat(messages=(Message(role="user", content="hello"),))


async def forever(request: Request) -> None:
    await asyncio.Event().wait()


def left_running() -> set[asyncio.Task[object]]:
    return asyncio.all_tasks() - {asyncio.current_task()}  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Done(FlowResult):
    """A flow's result with nothing of its own."""


async def flow(backend: Backend, run: Run) -> Done:
    """Two calls at once, a stream, a score, and what is made of them."""

    async def body() -> None:
        one, two = run.backend(backend, "one"), run.backend(backend, "two")
        await together([one.complete(ASKED), two.complete(ASKED)])
        run.decide("one", "yes", "it was whole", 0.5)
        async for _ in run.backend(backend, "stream").stream(ASKED):
            pass
        await run.backend(backend, "score").score(ASKED, [(1, 2), (3,)])
        run.decide("score", "no", "it was small")

    await run.execute(body)
    return run.end(Done(**run.finish()))


def scripted(before: Callable[[Request], Awaitable[None]] | None = None) -> Scripted:
    return Scripted({None: "ab"}, before=before)


# ---------------------------------------------------------------------- the record


async def test_a_run_keeps_its_calls_and_decisions_and_tells_them_in_order() -> None:
    told: list[Event] = []
    result = await flow(scripted(), Run(seed=7, on_event=told.append))
    assert result.error is None
    result.raise_for_error()
    assert result.seed == 7
    assert [(event.kind, event.step) for event in told] == [
        ("step", "one"),
        ("step", "two"),
        ("call", "one"),
        ("call", "two"),
        ("decision", "one"),
        ("step", "stream"),
        ("text", "stream"),
        ("text", "stream"),
        ("call", "stream"),
        ("step", "score"),
        ("call", "score"),
        ("decision", "score"),
        ("end", "end"),
    ]
    assert [event.as_dict()["text"] for event in told if event.kind == "text"] == ["a", "b"]
    assert [call.step for call in result.calls] == ["one", "two", "stream", "score"]
    assert result.decisions == (Decision("one", "yes", "it was whole", 0.5), Decision("score", "no", "it was small"))
    assert told[-1].data == {"result": result.as_dict()}
    for event in told:
        json.dumps(event.as_dict(), allow_nan=False)


async def test_a_call_is_kept_with_what_was_asked_and_what_came_of_it() -> None:
    backend = scripted()
    result = await flow(backend, Run())
    assert [call.request for call in result.calls] == [ASKED] * 4
    completion, _, streamed, score = (call.outcome for call in result.calls)
    assert isinstance(completion, Completion)
    assert isinstance(streamed, Completion)
    assert isinstance(score, Score)
    assert [call.continuations for call in result.calls] == [(), (), (), ((1, 2), (3,))]
    shown = json.loads(json.dumps(result.as_dict(), allow_nan=False))
    assert [call["step"] for call in shown["calls"]] == ["one", "two", "stream", "score"]
    assert shown["calls"][2]["text"] == ["ab"]
    assert "text" not in shown["calls"][3]
    assert shown["error"] is None


async def test_usage_is_the_sum_over_the_calls() -> None:
    result = await flow(scripted(), Run())
    assert len({call.usage for call in result.calls}) > 1
    for name in NO_USAGE.as_dict():
        assert result.usage.as_dict()[name] == sum(call.usage.as_dict()[name] for call in result.calls), name
    assert result.tokens_spent == result.usage.computed_tokens + result.usage.completion_tokens > 0
    assert total([]) == NO_USAGE
    assert total([Usage(1, 2, 3, 4, 5, 6), Usage(10, 20, 30, 40, 50, 60)]) == Usage(11, 22, 33, 44, 55, 66)


def test_a_call_is_told_without_its_prompt() -> None:
    call = Call("step", ASKED, ForwardFailed("it"))
    assert call.as_dict() == {
        "adapter": None,
        "usage": NO_USAGE.as_dict(),
        "error": {"code": "forward_failed", "message": "it"},
    }


async def test_a_failing_call_is_kept_once_with_its_error() -> None:
    for at, step in enumerate(("one", "two", "stream", "score")):
        told: list[Event] = []
        backend = scripted()
        result = await flow(Failing(backend, at), Run(on_event=told.append))
        assert isinstance(result.error, ForwardFailed)
        with pytest.raises(ForwardFailed):
            result.raise_for_error()
        failed = [call for call in result.calls if isinstance(call.outcome, ForwardFailed)]
        assert [call.step for call in failed] == [step]
        assert failed[0].usage == NO_USAGE
        shown = result.as_dict()
        assert shown["error"] == {"code": "forward_failed", "message": f"call {at} failed"}
        assert shown["calls"][-1 if at > 1 else 0]["error"] == shown["error"]
        assert [event.kind for event in told].count("call") == len(result.calls)
        assert told[-1].kind == "end"
        assert backend.running == 0
        assert not left_running()


async def test_what_fails_beside_another_call_leaves_that_one_noted_as_left() -> None:
    result = await flow(Failing(scripted(forever), 1), Run())
    assert [(call.step, type(call.outcome)) for call in result.calls] == [("two", ForwardFailed), ("one", Cancelled)]


async def test_a_stream_that_is_left_early_is_noted_and_closed() -> None:
    backend, run = scripted(), Run()

    async def body() -> None:
        async with aclosing(run.backend(backend, "left").stream(ASKED)) as deltas:  # type: ignore[type-var]
            async for _ in deltas:
                break
        assert backend.running == 0
        async with aclosing(run.backend(backend, "whole").stream(ASKED)) as deltas:  # type: ignore[type-var]
            async for delta in deltas:
                if delta.completion is not None:
                    break

    await run.execute(body)
    assert run.error is None
    assert [(call.step, type(call.outcome)) for call in run.calls] == [("left", Cancelled), ("whole", Completion)]
    assert backend.running == 0


async def test_adapters_are_asked_for_once_in_a_run() -> None:
    class Slow(Scripted):
        asked = 0

        async def adapters(self) -> tuple[AdapterInfo, ...]:
            self.asked += 1
            await asyncio.sleep(0)
            return await super().adapters()

    first, second, run = Slow({"jailbreak": {"yes": 1.0}}), Slow({"certainty": {9: 1.0}}), Run()

    async def body() -> None:
        both = [run.backend(first, str(step)).adapters() for step in range(3)]
        infos = await together([*both, run.backend(second, "other").adapters()])
        assert [[info.name for info in each] for each in infos] == [["jailbreak"]] * 3 + [["certainty"]]
        first.infos.clear()
        assert await run.backend(first, "later").adapters() == infos[0]

    await run.execute(body)
    assert (first.asked, second.asked) == (1, 1)


def test_a_seed_is_drawn_and_told() -> None:
    seeds = {Run().seed for _ in range(8)}
    assert len(seeds) > 1
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert Run(seed=0).finish()["seed"] == 0


# ---------------------------------------------------------------------- what stops it


async def test_a_deadline_stops_it_with_what_there_is() -> None:
    backend = scripted(forever)
    result = await flow(backend, Run(deadline_s=0.01))
    assert isinstance(result.error, DeadlineExceeded)
    assert "0.01" in str(result.error)
    assert [type(call.outcome) for call in result.calls] == [Cancelled] * len(backend.requests)
    assert result.seconds >= 0.01
    assert backend.running == 0
    assert not left_running()


@pytest.mark.parametrize("deadline_s", [-1.0, 0.0])
async def test_a_deadline_that_has_passed_lets_nothing_begin(deadline_s: float) -> None:
    result = await flow(scripted(forever), Run(deadline_s=deadline_s))
    assert isinstance(result.error, DeadlineExceeded)


async def test_requests_are_given_what_is_left_of_the_time() -> None:
    backend, run = scripted(), Run(deadline_s=60)

    async def body() -> None:
        metered = run.backend(backend, "step")
        await metered.complete(ASKED)
        await metered.complete(ASKED.model_copy(update={"deadline_s": 5.0}))
        await metered.complete(ASKED.model_copy(update={"deadline_s": 500.0}))

    await run.execute(body)
    whole, own, longer = (request.deadline_s for request in backend.requests)
    assert own == 5.0
    assert whole is not None
    assert longer is not None
    assert 50 < longer <= whole <= 60
    assert [call.request.deadline_s for call in run.calls] == [None, 5.0, 500.0], "what was asked is kept as it was"


async def test_a_timeout_of_the_bodys_own_is_not_the_flows() -> None:
    async def body() -> None:
        raise TimeoutError("of a socket")

    for deadline_s in (None, 60.0):
        with pytest.raises(TimeoutError, match="socket"):
            await Run(deadline_s=deadline_s).execute(body)


async def test_no_call_begins_once_the_tokens_are_spent() -> None:
    whole = await flow(scripted(), Run())
    first_two = sum(call.usage.computed_tokens + call.usage.completion_tokens for call in whole.calls[:2])
    for max_tokens, calls in ((0, 0), (1, 2), (first_two, 2), (first_two + 1, 3), (10_000, 4)):
        backend = scripted()
        result = await flow(backend, Run(max_tokens=max_tokens))
        assert len(result.calls) == len(backend.requests) == calls, max_tokens
        assert isinstance(result.error, BudgetExceeded) == (calls < 4)
        if calls < 4:
            assert str(max_tokens) in str(result.error)


async def test_a_run_serves_one_flow() -> None:
    run = Run()
    assert (await flow(scripted(), run)).error is None
    with pytest.raises(RuntimeError, match="make another"):
        await flow(scripted(), run)


async def test_a_run_that_is_cancelled_before_it_starts_begins_nothing() -> None:
    run, backend = Run(), scripted()
    run.cancel()
    result = await flow(backend, run)
    assert isinstance(result.error, Cancelled)
    assert (result.calls, result.decisions, backend.requests) == ((), (), [])


def cancelling_from(at: int) -> tuple[Run, list[Event]]:
    """A run that is cancelled at its event number `at`, and at each one after it: once is enough."""
    told: list[Event] = []

    def listener(event: Event) -> None:
        told.append(event)
        if len(told) > at:
            run.cancel()

    run = Run(on_event=listener)
    return run, told


async def test_cancelling_at_each_event_gives_what_there_was() -> None:
    events: list[Event] = []
    await flow(scripted(), Run(on_event=events.append))
    for at in range(len(events)):
        run, told = cancelling_from(at)
        backend = scripted()
        result = await flow(backend, run)
        last = events[at].kind == "end"
        assert isinstance(result.error, Cancelled) or last, events[at]
        assert [e.kind for e in told[: at + 1]] == [e.kind for e in events[: at + 1]]
        assert told[-1].data == {"result": result.as_dict()}
        assert len(result.decisions) == sum(event.kind == "decision" for event in told)
        assert backend.running == 0
        assert not left_running()


async def test_cancelling_what_has_ended_changes_nothing() -> None:
    run = Run()
    result = await flow(scripted(), run)
    run.cancel()
    assert result.error is None
    assert run.error is None


@pytest.mark.parametrize("both", [False, True])
async def test_cancellation_of_the_callers_task_is_the_callers(both: bool) -> None:
    backend, told = scripted(forever), list[Event]()
    run = Run(on_event=told.append, deadline_s=60)
    task = asyncio.create_task(flow(backend, run))
    while backend.running < 2:
        await asyncio.sleep(0)
    if both:
        run.cancel()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()
    assert backend.running == 0
    assert not left_running()
    assert told[-1].kind == "call", "a flow that gives no result tells no end"


async def test_the_callers_own_timeout_is_the_callers() -> None:
    backend = scripted(forever)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await flow(backend, Run(deadline_s=60))
    assert backend.running == 0


async def test_a_cancellation_that_the_body_turns_into_something_else_is_still_the_callers() -> None:
    async def body() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError as error:
            raise ForwardFailed("it was cut short") from error

    task = asyncio.create_task(Run().execute(body))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_something_inside_that_was_cancelled_is_no_cancellation_of_the_caller() -> None:
    async def body() -> None:
        inner = asyncio.create_task(asyncio.Event().wait())
        await asyncio.sleep(0)
        inner.cancel()
        await inner

    run = Run()
    await run.execute(body)
    assert isinstance(run.error, Cancelled)


# ---------------------------------------------------------------------- listeners


async def test_what_a_listener_raises_stops_the_flow_and_nothing_is_left() -> None:
    events: list[Event] = []
    await flow(scripted(), Run(on_event=events.append))
    for error in (ValueError("mine"), ForwardFailed("mine")):
        for at in range(len(events)):
            told: list[Event] = []

            def listener(event: Event, at: int = at, told: list[Event] = told, error: Exception = error) -> None:
                told.append(event)
                if len(told) == at + 1:
                    raise error

            run, backend = Run(on_event=listener), scripted()
            if isinstance(error, MidstreamError) and events[at].kind != "end":
                assert (await flow(backend, run)).error is error
            else:
                with pytest.raises(type(error), match="mine"):
                    await flow(backend, run)
            assert len({id(call) for call in run.calls}) == len(run.calls)
            steps = [call.step for call in run.calls]
            assert len(set(steps)) == len(steps), "no call is noted twice"
            assert backend.running == 0
            assert not left_running()
