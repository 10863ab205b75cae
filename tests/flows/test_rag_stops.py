"""A RAG turn that is stopped, anywhere, on a tiny engine: a typed error, what was found, and nothing held."""

from __future__ import annotations

import asyncio
import json

import pytest

from midstream.engine.engine import AsyncEngine
from midstream.errors import BudgetExceeded, Cancelled, DeadlineExceeded, ForwardFailed
from midstream.flows.events import Event
from midstream.flows.rag import RagSettings, RagTurn, rag_turn
from midstream.flows.run import Run
from midstream.transcript import Transcript
from midstream.types import Chat, Message, SamplingParams
from tests.flows.backends import Failing
from tests.flows.engines import check_idle
from tests.flows.retrievers import EDDYSTONE, LIZARD, Shelf

EARLIER = Chat(
    messages=(
        Message(role="user", content="Which one stands at the Lizard?"),
        Message(role="assistant", content="The Lizard lighthouse."),
    )
)
QUESTION = "And when was it lit?"
# Random adapters decide anything: with these limits every step is taken.
EVERY_STEP = RagSettings(
    guard=1.0, answerable=0.0, requirement="Give a year.", params=SamplingParams(max_tokens=8, temperature=1.0)
)
CLARIFY = EVERY_STEP.model_copy(update={"answerable": 1.0, "unanswerable": "clarify"})
SAY = EVERY_STEP.model_copy(update={"answerable": 1.0})
REFUSE = EVERY_STEP.model_copy(update={"guard": 0.0})
ANSWER_ALONE = RagSettings(
    guard=None, rewrite=False, answerable=None, grounded=None, certain=None, params=SamplingParams(max_tokens=1)
)
OUTCOMES = {"answered": EVERY_STEP, "clarified": CLARIFY, "unanswerable": SAY, "refused": REFUSE}
BEFORE_THE_ANSWER = {"guard", "rewrite", "retrieve", "answerable", "answer", "clarify"}


async def play(backend: object, start: Transcript, settings: RagSettings, run: Run) -> RagTurn:
    turn = await rag_turn(backend, start, QUESTION, Shelf(LIZARD, EDDYSTONE), settings, run=run)  # type: ignore[arg-type]
    assert asyncio.all_tasks() == {asyncio.current_task()}
    json.dumps(turn.as_dict(), allow_nan=False)
    return turn


async def usable(engine: AsyncEngine, turn: RagTurn, start: Transcript, whole: RagTurn) -> None:
    """Nothing is held, and the conversation goes on: with the turn where it was whole, else as it was."""
    await check_idle(engine)
    if turn.outcome == "stopped":
        assert turn.transcript == start
        again = await play(engine, turn.transcript, ANSWER_ALONE, Run())
        assert again.error is None
        assert again.transcript.messages[: len(start.messages)] == start.messages
    else:
        assert turn.transcript == whole.transcript
        assert turn.answer == whole.answer
    assert turn.outcome in ("stopped", whole.outcome)
    assert not turn.trusted or turn.error is None
    for name, score in turn.scores.items():
        assert score == pytest.approx(whole.scores[name], abs=1e-3)


@pytest.fixture
async def start(engine: AsyncEngine) -> Transcript:
    return await Transcript.of(engine, EARLIER)


@pytest.mark.parametrize("outcome", OUTCOMES)
async def test_whatever_call_fails_the_turn_says_so_and_the_conversation_goes_on(
    engine: AsyncEngine, start: Transcript, outcome: str
) -> None:
    settings = OUTCOMES[outcome]
    whole = await play(engine, start, settings, Run(seed=1))
    assert (whole.error, whole.outcome) == (None, outcome)
    counted = Failing(engine, None)
    await play(counted, start, settings, Run(seed=1))
    assert len(counted.calls) >= 5
    for at, verb in enumerate(counted.calls):
        turn = await play(Failing(engine, at), start, settings, Run(seed=1))
        assert isinstance(turn.error, ForwardFailed), (at, verb)
        if verb in ("complete", "stream", "score"):
            assert sum(isinstance(call.outcome, ForwardFailed) for call in turn.calls) == 1
        await usable(engine, turn, start, whole)


async def test_an_answer_that_fails_midway_is_kept_as_far_as_it_came(engine: AsyncEngine, start: Transcript) -> None:
    whole = await play(engine, start, EVERY_STEP, Run(seed=1))
    counted = Failing(engine, None)
    await play(counted, start, EVERY_STEP, Run(seed=1))
    at = counted.calls.index("stream")
    answers = []
    for deltas in range(4):
        turn = await play(Failing(engine, at, deltas=deltas), start, EVERY_STEP, Run(seed=1))
        assert isinstance(turn.error, ForwardFailed)
        assert turn.outcome == "stopped"
        assert whole.answer.startswith(turn.answer)
        assert len(turn.passages) == 2
        assert set(turn.scores) == {"jailbreak", "answerability"}
        answers.append(turn.answer)
        await usable(engine, turn, start, whole)
    assert answers == sorted(answers, key=len)
    assert answers[0] == ""
    assert answers[-1] != ""


@pytest.mark.parametrize("outcome", OUTCOMES)
async def test_cancelled_after_any_event_it_gives_what_it_has(
    engine: AsyncEngine, start: Transcript, outcome: str
) -> None:
    settings = OUTCOMES[outcome]
    events: list[Event] = []
    whole = await play(engine, start, settings, Run(seed=1, on_event=events.append))
    for at in range(len(events)):
        run, told = cancelled_at(at)
        turn = await play(engine, start, settings, run)
        ended = events[at].kind == "end"
        assert isinstance(turn.error, Cancelled) or (ended and turn.error is None)
        assert told[-1].data == {"result": turn.as_dict()}
        await usable(engine, turn, start, whole)
        if events[at].step in BEFORE_THE_ANSWER and events[at].kind != "call" and outcome != "refused":
            assert turn.outcome == "stopped", events[at]


def cancelled_at(at: int) -> tuple[Run, list[Event]]:
    told: list[Event] = []

    def listener(event: Event) -> None:
        told.append(event)
        if len(told) == at + 1:
            run.cancel()

    run = Run(seed=1, on_event=listener)
    return run, told


@pytest.mark.parametrize("outcome", OUTCOMES)
async def test_its_deadline_stops_it_anywhere(engine: AsyncEngine, start: Transcript, outcome: str) -> None:
    settings = OUTCOMES[outcome]
    whole = await play(engine, start, settings, Run(seed=1))
    for deadline_s in (0.0, 0.001, 0.003, *(whole.seconds * part / 8 for part in range(1, 8))):
        turn = await play(engine, start, settings, Run(seed=1, deadline_s=deadline_s))
        assert turn.error is None or isinstance(turn.error, DeadlineExceeded)
        assert deadline_s > 0 or turn.outcome == "stopped"
        await usable(engine, turn, start, whole)


async def test_its_budget_stops_it_between_calls(engine: AsyncEngine, start: Transcript) -> None:
    whole = await play(engine, start, EVERY_STEP, Run(seed=1))
    for max_tokens in (0, 1, whole.tokens_spent // 2, whole.tokens_spent - 1, whole.tokens_spent * 2):
        await engine.clear_cache()
        turn = await play(engine, start, EVERY_STEP, Run(seed=1, max_tokens=max_tokens))
        if max_tokens <= 1:
            assert isinstance(turn.error, BudgetExceeded)
            assert turn.outcome == "stopped"
        if max_tokens > whole.tokens_spent:
            assert turn.error is None
        await usable(engine, turn, start, whole)


async def test_the_callers_cancellation_leaves_nothing(engine: AsyncEngine, start: Transcript) -> None:
    events: list[Event] = []
    await play(engine, start, EVERY_STEP, Run(seed=1, on_event=events.append))
    for at in range(0, len(events) - 1, 3):
        reached = asyncio.Event()
        told: list[Event] = []

        def listener(event: Event, at: int = at, told: list[Event] = told, reached: asyncio.Event = reached) -> None:
            told.append(event)
            if len(told) == at + 1:
                reached.set()

        task = asyncio.create_task(
            rag_turn(engine, start, QUESTION, Shelf(LIZARD), EVERY_STEP, run=Run(seed=1, on_event=listener))
        )
        await reached.wait()
        if task.done():
            break  # the event was one of the last, and there is nothing to cancel
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert asyncio.all_tasks() == {asyncio.current_task()}
        await check_idle(engine)


async def test_a_turn_that_never_began_gives_the_conversation_back(engine: AsyncEngine, start: Transcript) -> None:
    run = Run()
    run.cancel()
    turn = await play(engine, start, EVERY_STEP, run)
    assert turn.transcript is start
    assert isinstance(turn.error, Cancelled)
    assert turn.calls == ()
