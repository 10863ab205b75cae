"""What RAG turns compute on a tiny engine: the new turn and the invocations, and what a fresh engine would."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from midstream.engine.engine import AsyncEngine
from midstream.flows.rag import RagSettings, RagTurn, rag_turn
from midstream.flows.run import Run
from midstream.transcript import Transcript
from midstream.types import Completion, Document, Request, SamplingParams
from tests.flows.retrievers import EDDYSTONE, LIZARD, Shelf

# Random adapters decide anything: with these limits every step is taken.
EVERY_STEP = RagSettings(
    guard=1.0, answerable=0.0, requirement="Give a year.", params=SamplingParams(max_tokens=10, temperature=1.0)
)
QUESTIONS = ("Who lit it?", "And when was that?", "Is it tall?", "Why?", "Where does it stand now?")

Pair = tuple[int, str | None]


class Tree:
    """All that was ever computed, as (token, owner) pairs: what an engine that forgets nothing can reuse."""

    def __init__(self) -> None:
        self._root: dict[Pair, dict] = {}  # type: ignore[type-arg]

    def read(self, pairs: list[Pair]) -> int:
        """How many of them are known; then all are."""
        node, known = self._root, 0
        for at, pair in enumerate(pairs):
            if pair in node and known == at:
                known += 1
            node = node.setdefault(pair, {})
        return known


def pairs_of(done: Completion) -> tuple[list[Pair], list[Pair]]:
    """A call's prompt, and what it has generated but for the last token, whose KV is not needed."""
    start = len(done.prompt_token_ids) if done.activation_index is None else done.activation_index
    owners = [None if at < start else done.adapter for at in range(len(done.prompt_token_ids))]
    generated: list[Pair] = [(token, done.adapter) for token in done.token_ids[:-1]]
    return list(zip(done.prompt_token_ids, owners, strict=True)), generated


def needed(tree: Tree, turn: RagTurn) -> int:
    """The prompt tokens that a turn's calls have to compute. The last one of a prompt is always computed."""
    count = 0
    for call in turn.calls:
        assert isinstance(call.outcome, Completion)
        prompt, generated = pairs_of(call.outcome)
        count += len(prompt) - min(tree.read(prompt), len(prompt) - 1)
        # The tail of a forced answer is appended and never read: only a base answer is gone on from.
        if call.outcome.adapter is None:
            tree.read(prompt + generated)
    return count


async def five_turns(engine: AsyncEngine, settings: RagSettings = EVERY_STEP, seed: int = 1) -> list[RagTurn]:
    transcript, turns = Transcript(), []
    for number, question in enumerate(QUESTIONS):
        shelf = Shelf(LIZARD, Document(text=f"Passage {number}."))
        turn = await rag_turn(engine, transcript, question, shelf, settings, run=Run(seed=seed + number))
        assert (turn.error, turn.outcome) == (None, "answered")
        transcript = turn.transcript
        turns.append(turn)
    return turns


async def test_five_turns_compute_each_token_once(engine: AsyncEngine) -> None:
    tree = Tree()
    for number, turn in enumerate(await five_turns(engine)):
        assert len(turn.calls) == (6 if number == 0 else 7)
        assert turn.usage.computed_tokens == needed(tree, turn)


async def test_a_turn_computes_its_question_twice_its_documents_once_and_the_invocations(engine: AsyncEngine) -> None:
    chat = engine.chat
    turns = await five_turns(engine)
    invocation = {info.name: len(info.invocation_tokens) for info in await engine.adapters()}
    opening, ending = (len(chat.encode(text)) for text in ("<|im_start|>user\n", "<|im_end|>\n"))
    header = len(chat.encode("<|im_start|>assistant\n"))
    for number, turn in enumerate(turns[1:], 1):
        before = turns[number - 1].transcript
        asked = turn.transcript.messages[-2]
        question = len(QUESTIONS[number]) + ending
        documents = len(
            chat.encode(
                "".join(
                    f"Document [{i}]:{f' {d.title}' if d.title else ''}\n{d.text}\n\n"
                    for i, d in enumerate(asked.documents, 1)
                )
            )
        )
        by_step = {call.step: call.usage for call in turn.calls}
        # The last turn's requirement has opened a user turn already.
        assert by_step["guard"].cached_tokens >= len(before.tokens) + opening
        assert by_step["guard"].computed_tokens + by_step["rewrite"].computed_tokens == (
            question + invocation["jailbreak"] + invocation["query_rewrite"]
        )
        assert by_step["answerable"].computed_tokens == documents + question + invocation["answerability"]
        assert by_step["answer"].computed_tokens == header
        # The checks read the answer's last token and the turn's closing, which the base model has not computed yet.
        instruction = opening + len(chat.encode("Requirement: Give a year.")) + ending
        checks = sum(by_step[step].computed_tokens for step in ("grounded", "certain", "met"))
        computed = len(by_step_prompt(turn, "answer")) + EVERY_STEP.params.max_tokens - 1
        closing = len(turn.transcript.tokens) - computed
        assert checks == closing + instruction + sum(
            invocation[name] for name in ("hallucination", "certainty", "requirement_check")
        )


def by_step_prompt(turn: RagTurn, step: str) -> tuple[int, ...]:
    done = next(call.outcome for call in turn.calls if call.step == step)
    assert isinstance(done, Completion)
    return done.prompt_token_ids


@pytest.mark.parametrize("outcome", ["refused", "unanswerable", "clarified"])
async def test_after_any_outcome_the_next_turn_reuses_the_conversation(engine: AsyncEngine, outcome: str) -> None:
    settings = {
        "refused": EVERY_STEP.model_copy(update={"guard": 0.0}),
        "unanswerable": EVERY_STEP.model_copy(update={"answerable": 1.0}),
        "clarified": EVERY_STEP.model_copy(update={"answerable": 1.0, "unanswerable": "clarify"}),
    }[outcome]
    tree = Tree()
    first = await rag_turn(engine, Transcript(), "Who?", Shelf(LIZARD), EVERY_STEP, run=Run(seed=1))
    needed(tree, first)
    second = await rag_turn(engine, first.transcript, "And when?", Shelf(LIZARD), settings, run=Run(seed=2))
    assert (second.error, second.outcome) == (None, outcome)
    second = replace(second, calls=tuple(call for call in second.calls if isinstance(call.outcome, Completion)))
    third = await rag_turn(engine, second.transcript, "Why?", Shelf(EDDYSTONE), EVERY_STEP, run=Run(seed=3))
    assert third.error is None
    # A call that a refusal cancelled may have computed what others share; what it leaves is there for all.
    assert second.usage.computed_tokens <= needed(tree, second)
    assert third.usage.computed_tokens <= needed(tree, third)


async def test_all_that_is_reused_is_as_from_scratch(engine: AsyncEngine) -> None:
    turns = await five_turns(engine)
    for turn in turns:
        for call in turn.calls:
            warm = call.outcome
            assert isinstance(warm, Completion)
            await engine.clear_cache()
            fresh = await engine.complete(call.request)
            assert fresh.usage.cached_tokens == 0
            assert fresh.text == warm.text
            shares, others = fresh.choices[0].probabilities, warm.choices[0].probabilities
            assert shares == (None if others is None else pytest.approx(others, abs=1e-3)), call.step
    await reused_logprobs(engine, turns)


async def reused_logprobs(engine: AsyncEngine, turns: list[RagTurn]) -> None:
    """The base answers' logprobs behind held tokens, and with nothing held."""
    await engine.clear_cache()
    requests = [
        (Request(prompt=call.outcome.prompt_token_ids), call.outcome.token_ids)
        for turn in turns
        for call in turn.calls
        if isinstance(call.outcome, Completion) and call.outcome.adapter is None
    ]
    warm = [await engine.score(request, [tokens]) for request, tokens in requests]
    assert all(score.usage.cached_tokens for score in warm[1:])
    for (request, tokens), score in zip(requests, warm, strict=True):
        await engine.clear_cache()
        fresh = await engine.score(request, [tokens])
        assert score.logprobs[0] == pytest.approx(fresh.logprobs[0], abs=1e-3)


async def test_a_seed_reproduces_a_conversation(engine: AsyncEngine) -> None:
    def found(turns: list[RagTurn]) -> list[object]:
        return [(turn.answer, turn.query, turn.transcript, turn.passages, turn.outcome) for turn in turns]

    first = await five_turns(engine)
    again = await five_turns(engine)
    await engine.clear_cache()
    fresh = await five_turns(engine)
    assert found(first) == found(again) == found(fresh)
    for one, other in zip(first, fresh, strict=True):
        assert one.scores == pytest.approx(other.scores, abs=1e-3)
        assert sorted(d.step for d in one.decisions) == sorted(d.step for d in other.decisions)
    assert found(await five_turns(engine, seed=100)) != found(first)


async def test_turns_at_the_same_time_are_as_one_after_the_other(engine: AsyncEngine) -> None:
    alone = [
        await rag_turn(engine, Transcript(), question, Shelf(LIZARD), EVERY_STEP, run=Run(seed=number))
        for number, question in enumerate(QUESTIONS)
    ]
    await engine.clear_cache()
    beside = await asyncio.gather(
        *(
            rag_turn(engine, Transcript(), question, Shelf(LIZARD), EVERY_STEP, run=Run(seed=number))
            for number, question in enumerate(QUESTIONS)
        )
    )
    for one, other in zip(alone, beside, strict=True):
        assert other.error is None
        assert one.answer == other.answer
        assert one.transcript == other.transcript
        assert one.scores == pytest.approx(other.scores, abs=1e-3)


async def test_branches_of_one_conversation_at_the_same_time(engine: AsyncEngine) -> None:
    start = (await five_turns(engine))[-1].transcript
    turns = await asyncio.gather(
        *(rag_turn(engine, start, question, Shelf(EDDYSTONE), EVERY_STEP, run=Run(seed=9)) for question in QUESTIONS)
    )
    for turn in turns:
        assert turn.error is None
        assert turn.transcript.tokens[: len(start.tokens)] == start.tokens
        for call in turn.calls:
            assert call.usage.cached_tokens >= len(start.tokens)
