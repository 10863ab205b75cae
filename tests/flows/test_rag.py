"""The turn of a retrieval chat: its steps, outcomes and thresholds, on scripted models."""

from __future__ import annotations

import asyncio
import itertools
import json
from typing import Any

import pytest
from pydantic import ValidationError

from midstream.errors import AdapterNotFound, OutputError, OverloadedError, RetrievalError
from midstream.flows.rag import RagSettings, RagTurn, rag_turn
from midstream.flows.run import Run
from midstream.retrieval import Passage
from midstream.transcript import Transcript
from midstream.types import Chat, Document, Message, Request, SamplingParams
from tests.flows.backends import END, READS, Script, Scripted, text_of
from tests.flows.retrievers import EDDYSTONE, LIZARD, Odd, Shelf

QUESTION = "And when was it lit?"
EARLIER = (
    Message(role="user", content="Which one stands at the Lizard?"),
    Message(role="assistant", content="The Lizard lighthouse."),
)
CHAT = Chat(messages=EARLIER)
QUERY = "When was the Lizard lighthouse lit?"
GOOD: dict[str | None, Script] = {
    None: "In 1752.",
    "jailbreak": {"yes": 0.125},
    "query_rewrite": json.dumps({"rewritten_question": QUERY}),
    "answerability": {"answerable": 0.75},
    "hallucination": {"grounded": 0.875},
    "certainty": {8: 1.0},
    "requirement_check": {"met": 0.625},
}


def good(**changed: Script) -> Scripted:
    """All goes well, but for what is changed; `base` is what the base model says."""
    scripts = {**GOOD, **changed}
    if "base" in scripts:
        scripts[None] = scripts.pop("base")
    return Scripted(scripts)


async def turn_of(
    backend: Scripted,
    conversation: Chat | Transcript = CHAT,
    retriever: Any = None,
    run: Run | None = None,
    **settings: Any,
) -> RagTurn:
    retriever = Shelf(LIZARD) if retriever is None else retriever
    turn = await rag_turn(backend, conversation, QUESTION, retriever, RagSettings(**settings), run=run)
    assert backend.running == 0
    json.dumps(turn.as_dict(), allow_nan=False)
    return turn


def steps(turn: RagTurn) -> list[str]:
    return [call.step for call in turn.calls]


def decided(turn: RagTurn) -> dict[str, str]:
    return {decision.step: decision.outcome for decision in turn.decisions}


# ---------------------------------------------------------------------- outcomes


async def test_a_question_is_guarded_rewritten_searched_for_answered_and_checked() -> None:
    backend, shelf = good(), Shelf(LIZARD, EDDYSTONE)
    turn = await turn_of(backend, retriever=shelf, requirement="Give a year.", run=Run(seed=3))
    assert (turn.error, turn.outcome, turn.answer, turn.trusted) == (None, "answered", "In 1752.", True)
    assert (turn.question, turn.query, shelf.queries) == (QUESTION, QUERY, [(QUERY, 3)])
    assert turn.passages == (Passage(LIZARD, 1.0), Passage(EDDYSTONE, 0.5))
    assert turn.scores == {
        "jailbreak": 0.125,
        "answerability": 0.75,
        "hallucination": 0.875,
        "certainty": pytest.approx(0.85),
        "requirement_check": 0.625,
    }
    assert sorted(steps(turn)) == sorted(["guard", "rewrite", "answerable", "answer", "grounded", "certain", "met"])
    assert {call.request.adapter for call in turn.calls} == {None, *READS}
    assert decided(turn) == {
        "guard": "allowed",
        "rewrite": "rewritten",
        "retrieve": "2 passages",
        "answerable": "yes",
        "grounded": "yes",
        "certain": "yes",
        "met": "yes",
    }
    asked = Message(role="user", content=QUESTION, documents=(LIZARD, EDDYSTONE))
    said = Message(role="assistant", content="In 1752.")
    assert turn.transcript == await Transcript.of(backend, Chat(messages=(*EARLIER, asked, said)))
    assert turn.seed == 3
    shown = json.loads(json.dumps(turn.as_dict()))
    assert shown["passages"][1] == {**EDDYSTONE.model_dump(), "score": 0.5}
    assert (shown["outcome"], shown["answer"], shown["error"]) == ("answered", "In 1752.", None)


async def test_the_last_event_is_the_result() -> None:
    told: list[Any] = []
    turn = await turn_of(good(), run=Run(on_event=told.append))
    assert told[-1].kind == "end"
    assert told[-1].data == {"result": turn.as_dict()}
    text = "".join(event.data["text"] for event in told if (event.kind, event.step) == ("text", "answer"))
    assert text == turn.answer


async def test_an_attack_is_refused_and_nothing_is_searched_for() -> None:
    backend, shelf = good(jailbreak={"yes": 0.75}), Shelf(LIZARD)
    turn = await turn_of(backend, retriever=shelf, refusal="No.")
    assert (turn.error, turn.outcome, turn.answer, turn.passages) == (None, "refused", "No.", ())
    assert shelf.queries == []
    assert None not in {call.request.adapter for call in turn.calls}
    assert text_of(turn.transcript.tokens).endswith(f"user: {QUESTION}{END}assistant: No.{END}")


@pytest.mark.parametrize("how", ["say", "clarify"])
async def test_what_the_passages_do_not_answer_is_not_answered(how: str) -> None:
    backend = good(answerability={"answerable": 0.25}, base="Which lamp do you mean?")
    turn = await turn_of(backend, unanswerable=how, unknown="I do not know.")
    assert turn.error is None
    assert decided(turn)["answerable"] == "no"
    said = {"say": "I do not know.", "clarify": "Which lamp do you mean?"}[how]
    assert (turn.outcome, turn.answer) == ({"say": "unanswerable", "clarify": "clarified"}[how], said)
    asked = Message(role="user", content=QUESTION, documents=(LIZARD,))
    whole = Chat(messages=(*EARLIER, asked, Message(role="assistant", content=said)))
    assert turn.transcript == await Transcript.of(backend, whole), "what told it to ask back is no part of it"
    assert steps(turn)[-1] == {"say": "answerable", "clarify": "clarify"}[how]


async def test_asking_back_is_told_at_the_end_of_the_question() -> None:
    backend = good(answerability={"answerable": 0.0})
    turn = await turn_of(backend, unanswerable="clarify")
    request = next(call.request for call in turn.calls if call.step == "clarify")
    assert isinstance(request.prompt, tuple)
    last = text_of(request.prompt).split(END)[-2]
    assert last.startswith("user: Document [1]")
    assert "Ask me one short question" in last
    assert text_of(request.prompt).count("user: ") == 2, "no second user turn: some templates refuse it"


# ---------------------------------------------------------------------- steps left out


@pytest.mark.parametrize(
    ("settings", "left_out"),
    [
        ({"guard": None}, {"guard"}),
        ({"rewrite": False}, {"rewrite"}),
        ({"answerable": None}, {"answerable"}),
        ({"grounded": None}, {"grounded"}),
        ({"certain": None}, {"certain"}),
        ({"requirement": None}, {"met"}),
        ({"passages": 0}, {"rewrite", "answerable", "grounded"}),
        ({"guard": None, "rewrite": False, "answerable": None, "grounded": None, "certain": None}, None),
    ],
)
async def test_steps_are_left_out(settings: dict[str, Any], left_out: set[str] | None) -> None:
    every = {"guard", "rewrite", "answerable", "answer", "grounded", "certain", "met"}
    shelf = Shelf(LIZARD)
    backend = good()
    turn = await turn_of(backend, retriever=shelf, **{"requirement": "Give a year.", **settings})
    assert set(steps(turn)) == ({"answer", "met"} if left_out is None else every - left_out)
    assert (turn.error, turn.outcome) == (None, "answered")
    assert len(shelf.queries) == (0 if "passages" in settings else 1)
    if turn.passages == ():
        assert "Document" not in text_of(turn.transcript.tokens)
    if "rewrite" in (left_out or ("rewrite",)):
        assert turn.query == QUESTION


async def test_only_the_adapters_of_the_steps_that_are_taken_are_needed() -> None:
    settings = {"guard": None, "rewrite": False, "answerable": None, "grounded": None, "certain": None}
    assert (await turn_of(Scripted({None: "In 1752."}), **settings)).outcome == "answered"
    for name, step in (("jailbreak", "guard"), ("certainty", "certain")):
        scripts = {key: script for key, script in GOOD.items() if key != name}
        turn = await turn_of(Scripted(scripts))
        assert isinstance(turn.error, AdapterNotFound)
        assert name in str(turn.error)
        assert step not in decided(turn)
        assert turn.outcome == ("stopped" if step == "guard" else "answered")
        assert not turn.trusted


async def test_the_first_question_is_not_rewritten() -> None:
    system = Message(role="system", content="Be brief.")
    backend = good()
    for conversation in (Transcript(), await Transcript.of(backend, Chat(messages=(system,)))):
        turn = await turn_of(backend, conversation)
        assert (turn.outcome, turn.query) == ("answered", QUESTION)
        assert "rewrite" not in steps(turn)
        assert decided(turn)["rewrite"] == "kept"


@pytest.mark.parametrize("rewritten", ['{"rewritten_question": ""}', '{"rewritten_question": " \\n"}'])
async def test_an_empty_rewrite_keeps_the_question(rewritten: str) -> None:
    turn = await turn_of(good(query_rewrite=rewritten), retriever=(shelf := Shelf(LIZARD)))
    assert (turn.outcome, turn.query, shelf.queries) == ("answered", QUESTION, [(QUESTION, 3)])
    assert decided(turn)["rewrite"] == "kept"


async def test_a_rewrite_that_was_cut_short_keeps_the_question() -> None:
    turn = await turn_of(good(query_rewrite='{"rewritten_question": "When was'))
    assert (turn.error, turn.outcome, turn.query) == (None, "answered", QUESTION)
    reason = next(decision.reason for decision in turn.decisions if decision.step == "rewrite")
    assert "cannot be read" in reason
    assert "rewrite" in steps(turn), "its tokens are counted"


async def test_the_rewritten_question_is_stripped() -> None:
    turn = await turn_of(good(query_rewrite=json.dumps({"rewritten_question": f" {QUERY}\n"})))
    assert turn.query == QUERY


async def test_any_other_check_that_cannot_be_read_stops_the_turn() -> None:
    turn = await turn_of(good(hallucination=OutputError("it is no label")))
    assert isinstance(turn.error, OutputError)
    assert (turn.outcome, turn.answer, turn.trusted) == ("answered", "In 1752.", False)
    assert turn.transcript.messages[-1].content == "In 1752."


# ---------------------------------------------------------------------- retrieval


async def test_no_passage_is_no_answer() -> None:
    turn = await turn_of(good(), retriever=Shelf())
    assert (turn.outcome, turn.passages) == ("unanswerable", ())
    assert "answerability" not in turn.scores
    assert "answerable" not in steps(turn)


async def test_an_answer_without_passages_is_not_judged_by_them() -> None:
    for settings in ({"answerable": None}, {"answerable": 0.0}):
        turn = await turn_of(good(), retriever=Shelf(), **settings)
        assert turn.outcome == "answered"
        assert set(steps(turn)) == {"guard", "rewrite", "answer", "certain"}


async def test_more_passages_than_were_asked_for_are_left() -> None:
    for given in ([Passage(LIZARD, 1.0)] * 9, itertools.repeat(Passage(LIZARD, 1.0))):
        turn = await turn_of(good(), retriever=Odd(given), passages=2)
        assert turn.passages == (Passage(LIZARD, 1.0),) * 2
        assert text_of(turn.transcript.tokens).count(LIZARD.text) == 2


@pytest.mark.parametrize(
    "what",
    [
        RuntimeError("disk"),
        KeyError("key"),
        TimeoutError(),
        StopAsyncIteration(),
        asyncio.CancelledError(),
        ExceptionGroup("both", [ValueError(), KeyError()]),
        None,
        7,
        ["text"],
        [LIZARD],
    ],
    ids=repr,
)
async def test_a_retriever_that_fails_or_gives_something_else_is_a_retrieval_error(what: object) -> None:
    turn = await turn_of(good(), retriever=Odd(what))
    if isinstance(what, asyncio.CancelledError):
        assert turn.error is not None
        assert turn.error.code == "cancelled"
    else:
        assert isinstance(turn.error, RetrievalError)
        assert isinstance(what, (list, int)) or type(what).__name__ in str(turn.error)
    assert (turn.outcome, turn.query, turn.scores) == ("stopped", QUERY, {"jailbreak": 0.125})
    assert turn.transcript.messages == EARLIER


async def test_a_retrievers_own_typed_error_is_the_turns() -> None:
    error = OverloadedError("busy")
    assert (await turn_of(good(), retriever=Odd(error))).error is error


# ---------------------------------------------------------------------- thresholds


@pytest.mark.parametrize(
    ("probability", "limit", "outcome"),
    [(0.5, 0.5, "refused"), (0.499, 0.5, "answered"), (0.0, 0.0, "refused"), (1.0, 1.0, "refused")],
)
async def test_the_guard_refuses_from_its_limit_on(probability: float, limit: float, outcome: str) -> None:
    assert (await turn_of(good(jailbreak={"yes": probability}), guard=limit)).outcome == outcome


@pytest.mark.parametrize(
    ("probability", "limit", "outcome"),
    [(0.5, 0.5, "answered"), (0.499, 0.5, "unanswerable"), (0.0, 0.0, "answered"), (1.0, 1.0, "answered")],
)
async def test_it_is_answered_from_the_limit_on(probability: float, limit: float, outcome: str) -> None:
    turn = await turn_of(good(answerability={"answerable": probability}), answerable=limit)
    assert turn.outcome == outcome


@pytest.mark.parametrize("script", ["hallucination", "requirement_check"])
@pytest.mark.parametrize(("probability", "limit"), [(0.5, 0.5), (0.499, 0.5), (0.0, 0.0), (1.0, 1.0), (0.9, 1.0)])
async def test_it_is_trusted_from_the_limit_on(script: str, probability: float, limit: float) -> None:
    label = {"hallucination": "grounded", "requirement_check": "met"}[script]
    settings = {"grounded": limit} if script == "hallucination" else {"met": limit}
    turn = await turn_of(good(**{script: {label: probability}}), requirement="Give a year.", **settings)
    assert turn.outcome == "answered"
    assert turn.trusted == (probability >= limit)
    assert decided(turn)[label] == ("yes" if probability >= limit else "no")


async def test_certainty_is_the_expected_chance() -> None:
    for shares, expected in (({0: 1.0}, 0.05), ({9: 1.0}, 0.95), ({2: 0.5, 3: 0.5}, 0.3)):
        turn = await turn_of(good(certainty=shares))
        assert turn.scores["certainty"] == pytest.approx(expected)
        assert turn.trusted == (expected >= 0.2)


def test_settings_are_checked() -> None:
    for wrong in (
        {"guard": 1.5},
        {"passages": -1},
        {"passages": 65},
        {"requirement": ""},
        {"unanswerable": "guess"},
        {"unknwon": "x"},
    ):
        with pytest.raises(ValidationError):
            RagSettings(**wrong)  # type: ignore[arg-type]


# ---------------------------------------------------------------------- at the same time


class Meeting:
    """Holds calls until as many are there as are expected at once."""

    def __init__(self, *groups: set[str | None]) -> None:
        self.groups = [(group, asyncio.Event()) for group in groups]
        self.there: set[str | None] = set()

    async def __call__(self, request: Request) -> None:
        self.there.add(request.adapter)
        for group, met in self.groups:
            if group <= self.there:
                met.set()
            if request.adapter in group:
                await met.wait()


async def test_the_guard_runs_beside_the_rewrite_and_the_checks_beside_one_another() -> None:
    checks: set[str | None] = {"hallucination", "certainty", "requirement_check"}
    backend = Scripted(GOOD, before=Meeting({"jailbreak", "query_rewrite"}, checks))
    turn = await turn_of(backend, requirement="Give a year.", run=Run(deadline_s=20))
    assert (turn.error, turn.outcome) == (None, "answered")


async def test_a_refusal_does_not_wait_for_the_rewrite() -> None:
    async def before(request: Request) -> None:
        if request.adapter == "query_rewrite":
            await asyncio.Event().wait()

    backend = Scripted({**GOOD, "jailbreak": {"yes": 1.0}}, before=before)
    turn = await turn_of(backend, run=Run(deadline_s=20))
    assert (turn.error, turn.outcome, turn.query) == (None, "refused", QUESTION)
    assert [(call.step, getattr(call.outcome, "code", "whole")) for call in turn.calls] == [
        ("guard", "whole"),
        ("rewrite", "cancelled"),
    ]


# ---------------------------------------------------------------------- the base model's turn


async def test_the_answer_is_drawn_with_the_runs_seed() -> None:
    for how, step in (({}, "answer"), ({"answerability": {"answerable": 0.0}}, "clarify")):
        params = SamplingParams(temperature=1.0)
        turn = await turn_of(good(**how), params=params, unanswerable="clarify", run=Run(seed=5))
        request = next(call.request for call in turn.calls if call.step == step)
        assert request.params == SamplingParams(temperature=1.0, seed=5)
        assert turn.trusted == (step == "answer"), "what was not answered is not to be trusted"


@pytest.mark.parametrize("given", [{"seed": 8}, {"n": 2}])
def test_settings_leave_seed_and_number_of_answers_to_the_flow(given: dict[str, int]) -> None:
    with pytest.raises(ValidationError, match="a flow"):
        RagSettings(params=SamplingParams(**given))


async def test_documents_of_the_conversation_stay_where_they_are() -> None:
    other = Document(text="It was automated in 1998.")
    first = Message(role="user", content="Which one?", documents=(other,))
    turn = await turn_of(good(), Chat(messages=(first, EARLIER[1])))
    assert text_of(turn.transcript.tokens).count(other.text) == 1
    assert turn.transcript.messages[0].documents == (other,)
    assert turn.transcript.messages[2].documents == (LIZARD,)
