"""Votes: what answers are compared by, and which group wins."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from midstream.backend import Backend
from midstream.engine.engine import AsyncEngine
from midstream.errors import AdapterNotFound, BudgetExceeded, InputError, OutputError
from midstream.flows.best_of_n import BestOfNSettings, best_of_n
from midstream.flows.keys import extracting, normalised
from midstream.flows.majority import (
    Majority,
    MajoritySettings,
    WeightedMajoritySettings,
    majority,
    weighted_majority,
)
from midstream.flows.run import Run
from midstream.types import Chat, Choice, Document, Message, Request, SamplingParams
from tests.flows.backends import Scripted
from tests.flows.engines import check_idle
from tests.flows.sweeps import Flow, cancel_at_every_event, ended, fail_at_every_call

CHAT = Chat(messages=(Message(role="user", content="Which?", documents=(Document(text="A passage."),)),))
LETTERS = SamplingParams(max_tokens=8, temperature=1.0, constraint=Choice(options=("ja", "nein")))


def scripted(*answers: str) -> Scripted:
    return Scripted({None: answers})


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("The  Lamp.", "lamp"),
        ("«lamp»!", "lamp"),
        ("a LAMP\n", "lamp"),
        ("An e-mail", "email"),
        ("**42**", "42"),
        ("`x`", "x"),
        ("3.5", "3.5"),
        ("35.", "35"),
        ("-5", "-5"),
        ("7-5", "75"),
        ("1/2", "1/2"),
        ("12,000,000", "12000000"),
        ("1,5", "1,5"),
        ("C++", "c++"),
        ("A.", "a"),
        ("the a", "the a"),
        ("...", "..."),
        ("STRASSE", "strasse"),
        ("straße", "strasse"),
        ("Theory of an anvil", "theory of anvil"),
        ("", ""),
    ],
)
def test_a_text_is_normalised(text: str, key: str) -> None:
    assert normalised(text) == key


def test_the_last_match_is_extracted() -> None:
    key = extracting(r"answer is\s+(\S+)")
    assert key("the answer is 4. No, the answer is 5.") == "5"
    assert key("I do not know") is None
    assert extracting(r"(x)?y")("y") is None, "the group has no part in the match"


def test_an_expression_does_not_backtrack() -> None:
    key = extracting("(" + "|".join("a" * i for i in range(1, 43)) + ")*$")
    assert key("a" * 50_000 + "b") is None
    assert extracting("(a+)+$")("a" * 50_000 + "b") is None
    assert extracting("(?:a?){40}(a{40})$")("a" * 40) == "a" * 40


def test_matches_that_each_read_all_of_the_text_are_given_up_once_for_all() -> None:
    key = extracting(r"([ab])(a|b| )*?a[\s\S]{800}c|b")
    with pytest.raises(TimeoutError, match="took longer than"):
        key("ab " * 10_000)
    with pytest.raises(TimeoutError, match="took longer than"):
        key("b")


@pytest.mark.parametrize("pattern", ["((((a){99}){99}){99}){99}", "((((a?){9}){9}){9}){9}", r"(\pL{300})"])
def test_an_expression_that_would_grow_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="RE2's syntax"):
        extracting(pattern)


async def test_most_votes_win_and_the_groups_are_told() -> None:
    result = await majority(scripted("blue", "The red.", "Red", "blue?", "red", "green"), CHAT, MajoritySettings(n=6))
    assert [(g.key, g.candidates, g.votes, g.weight) for g in result.groups] == [
        ("red", (1, 2, 4), 3, 3.0),
        ("blue", (0, 3), 2, 2.0),
        ("green", (5,), 1, 1.0),
    ]
    assert (result.text, result.stopped, result.error) == ("The red.", "all", None)
    assert result.winner == result.groups[0]
    assert result.transcript.messages[-1].content == "The red."
    assert all(c.score is None and not c.scores and not c.judging_tokens for c in result.candidates)
    shown = json.loads(json.dumps(result.as_dict()))
    assert (shown["best"], shown["groups"][1]["candidates"]) == (1, [0, 3])


async def test_on_a_tie_the_group_with_the_earliest_answer_wins() -> None:
    result = await majority(scripted("x", "red", "blue", "blue", "red"), CHAT, MajoritySettings(n=5))
    assert [g.key for g in result.groups] == ["red", "blue", "x"]


async def test_scores_outweigh_numbers() -> None:
    shares = {"red": 0.2, "Red": 0.25, "blue": 0.9}

    def share(prompt: str, request: Request) -> dict[str | int, float]:
        return {"grounded": shares[prompt.rsplit("assistant: ", 1)[1].split("\x03")[0]]}

    settings = WeightedMajoritySettings(n=3, weights={"hallucination": 1})
    backend = Scripted({None: ["red", "blue", "Red"], "hallucination": share})
    result = await weighted_majority(backend, CHAT, settings)
    assert [(g.key, g.votes) for g in result.groups] == [("blue", 1), ("red", 2)]
    assert [g.weight for g in result.groups] == pytest.approx([0.9, 0.45])
    assert result.text == "blue"
    agreeing = Scripted({None: ["red", "Red", "red"], "hallucination": share})
    assert (await weighted_majority(agreeing, CHAT, settings)).text == "Red", "the best-scored of the group"


async def test_answers_are_compared_by_what_is_extracted() -> None:
    backend = scripted("so the answer is 4", "no idea", "I think the answer is 5", "hm: the answer is 5.")
    result = await majority(backend, CHAT, MajoritySettings(n=4, extract=r"answer is ([^.]+)"))
    assert (result.text, result.winner and result.winner.key) == ("I think the answer is 5", "5")
    assert result.keyless == (1,)


async def test_a_callers_own_key_decides() -> None:
    result = await majority(
        scripted("aaa", "bb", "c", "dd", "keyless"),
        CHAT,
        MajoritySettings(n=5),
        key=lambda text: None if text == "keyless" else str(len(text)),
    )
    assert (result.text, result.groups[0].candidates, result.keyless) == ("bb", (1, 3), (4,))


async def test_misuse_is_named() -> None:
    for pattern in ("(", "no group", "(a{1,9999})", "(" * 900, "(?=a)(b)", r"(a)\1", "\ud800(a)"):
        with pytest.raises(ValidationError):
            MajoritySettings(extract=pattern)
    both = await majority(scripted("a"), CHAT, MajoritySettings(extract="(a)"), key=str)
    assert isinstance(both.error, InputError)
    failing = await majority(scripted("a"), CHAT, key=lambda text: text[9])
    assert isinstance(failing.error, InputError)
    assert "IndexError" in str(failing.error)
    number = await majority(scripted("a"), CHAT, key=len)  # type: ignore[arg-type]
    assert "must be a text" in str(number.error)
    assert all(candidate.text == "a" for candidate in number.candidates)


async def test_no_key_at_all_is_an_error_beside_the_answers() -> None:
    result = await majority(scripted("a", "b"), CHAT, MajoritySettings(n=2, extract="(z)"))
    assert isinstance(result.error, OutputError)
    assert (result.best, result.text, result.winner, result.keyless) == (None, "", None, (0, 1))
    assert [c.text for c in result.candidates] == ["a", "b"]


async def test_a_vote_within_a_budget_counts_what_there_is() -> None:
    settings = MajoritySettings(n=10, at_once=2, params=SamplingParams(max_tokens=4, temperature=1.0))
    result = await majority(scripted("red", "blue", "blue"), CHAT, settings, run=Run(max_tokens=60))
    assert (result.stopped, result.text, result.error) == ("budget", "blue", None)
    assert 2 < len(result.candidates) < 10
    none = await majority(scripted("red"), CHAT, settings, run=Run(max_tokens=0))
    assert isinstance(none.error, BudgetExceeded)


async def test_a_missing_adapter_is_the_error_of_a_weighted_vote() -> None:
    assert isinstance((await weighted_majority(scripted("a"), CHAT)).error, AdapterNotFound)


# ---------------------------------------------------------------------- wherever it is stopped


def voting(params: SamplingParams) -> Flow[Majority]:
    async def voted(backend: Backend, run: Run) -> Majority:
        return await weighted_majority(backend, CHAT, WeightedMajoritySettings(n=3, at_once=2, params=params), run=run)

    return voted


def by_seed() -> Scripted:
    """A model whose answer is decided by its seed."""

    def answer(prompt: str, request: Request) -> str:
        return "ja" if (request.params.seed or 0) % 3 else "nein"

    return Scripted({None: answer, "hallucination": {"grounded": 0.7}, "certainty": {3: 1.0}})


def check_found(result: Majority, whole: Majority) -> None:
    assert sum(c.finish_reason is not None for c in result.candidates) == ended(result, judged=False)
    assert sum(len(c.scores) for c in result.candidates) == ended(result, judged=True)
    scored = [c for c in result.candidates if c.score is not None]
    assert sum(group.votes for group in result.groups) == len(scored)
    assert (result.best is None) == (not scored)
    for candidate in scored:
        assert candidate.text == whole.candidates[candidate.index].text


async def test_a_vote_that_is_stopped_counts_what_there_is() -> None:
    voted = voting(SamplingParams(max_tokens=8, temperature=1.0))
    whole, stopped = await fail_at_every_call(voted, by_seed)
    stopped += await cancel_at_every_event(voted, by_seed)
    for result in stopped:
        check_found(result, whole)


async def test_an_engine_votes_alike_in_any_waves_and_is_left_idle(engine: AsyncEngine) -> None:
    voted = voting(LETTERS)
    whole, stopped = await fail_at_every_call(voted, lambda: engine, lambda: check_idle(engine))
    stopped += await cancel_at_every_event(voted, lambda: engine, lambda: check_idle(engine))
    for result in stopped:
        check_found(result, whole)
    assert {group.key for group in whole.groups} <= {"ja", "nein"}
    drawn = await best_of_n(engine, CHAT, BestOfNSettings(n=3, params=LETTERS), run=Run(seed=7))
    assert [c.text for c in drawn.candidates] == [c.text for c in whole.candidates], "the same draw as best of n"
