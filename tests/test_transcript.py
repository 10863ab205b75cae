"""Transcripts hold the tokens that were computed, over templates of several families."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import AsyncIterator, Sequence
from typing import Any, cast

import pytest

from midstream.backend import Backend
from midstream.engine.engine import AsyncEngine
from midstream.errors import InputError
from midstream.flows.answer import answer
from midstream.models.chat import ChatTokenizer
from midstream.models.load import prepare
from midstream.session import Engine
from midstream.transcript import Transcript
from midstream.types import (
    Chat,
    Completion,
    CompletionChoice,
    Document,
    FinishReason,
    Message,
    Request,
    SamplingParams,
)
from tests.flows.engines import check_idle
from tests.helpers import tiny_llama
from tests.templates import FOREIGN_END, TEMPLATES, templated
from tests.tiny import tiny_chat, tiny_engine

KEPT = sorted(set(TEMPLATES) - {"wandering"})
# What stands behind an answer's text, by how it ended.
ENDINGS: dict[str, tuple[str, FinishReason]] = {
    "its own end": ("{end}", "stop"),
    "a foreign end": (FOREIGN_END, "stop"),
    "a stop string": ("\nUser:", "stop"),
    "length": ("", "length"),
    "a constraint": ("", "stop"),
}
PASSAGE = Document(text="The lamp was lit in 1752.", title="Lizard")


class Tokens:
    """All of a backend that a transcript needs. Keeps how often it was asked."""

    def __init__(self, chat: ChatTokenizer) -> None:
        self.chat = chat
        self.asked = 0

    async def tokenize(self, prompt: str | Chat, *, header: bool = True) -> tuple[int, ...]:
        self.asked += 1
        if isinstance(prompt, str):
            return self.chat.encode(prompt)
        return self.chat.prompt(prompt) if header else self.chat.history(prompt)


def tokens_of(name: str) -> Backend:
    return cast(Backend, Tokens(templated(name)))


def user(text: str, *documents: Document) -> Message:
    return Message(role="user", content=text, documents=documents)


def told(text: str) -> Message:
    return Message(role="assistant", content=text)


def said(text: str, tokens: tuple[int, ...], finish: FinishReason = "stop") -> CompletionChoice:
    return CompletionChoice(0, text, tokens, finish)


# ---------------------------------------------------------------------- closings


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("name", KEPT)
async def test_an_answer_is_closed_as_the_template_closes_it_however_it_ended(name: str, ending: str) -> None:
    backend, chat = tokens_of(name), templated(name)
    behind, finish = ENDINGS[ending]
    behind = behind.format(end=TEMPLATES[name][1])
    transcript = Transcript()
    for question in ("one?", "two?", "three?"):
        transcript = await transcript.add(backend, user(question))
        prompt = await transcript.prompt(backend)
        assert prompt == chat.prompt(transcript.chat), "so what is held is the template's rendering"
        text = " fine" if name == "mistral" else "fine"
        transcript = await transcript.answered(backend, prompt, said(text, chat.encode(text + behind), finish))
        # One that is the last turn need not be closed as one that others follow.
        assert transcript.tokens == chat.history(transcript.chat)
        assert transcript.ends[-1] == len(transcript.tokens)
    assert [message.content for message in transcript.messages if message.role == "assistant"] == [text] * 3


@pytest.mark.parametrize("name", KEPT)
async def test_an_answer_that_was_empty_is_closed_too(name: str) -> None:
    backend, chat = tokens_of(name), templated(name)
    transcript = await Transcript().add(backend, user("one?"))
    prompt = await transcript.prompt(backend)
    end = chat.encode(TEMPLATES[name][1])
    answered = await transcript.answered(backend, prompt, said("", end))
    closed = await answered.add(backend, user("two?"))
    assert closed.tokens[: len(prompt)] == prompt
    rest = chat.decode(closed.tokens[len(prompt) :])
    assert rest.count(TEMPLATES[name][1]) == chat.decode(chat.history(closed.chat)[len(prompt) :]).count(
        TEMPLATES[name][1]
    )


@pytest.mark.parametrize("name", ["chatml", "llama", "gemma", "mistral"])
async def test_tokens_are_kept_though_their_text_has_others(name: str) -> None:
    backend, chat = tokens_of(name), templated(name)
    a, b = chat.encode("a") + chat.encode("b")
    (end,) = chat.encode(TEMPLATES[name][1])
    assert chat.encode("ab") not in ((a, b), (a, b, end)), "the tokenizer would write it as one token"
    transcript = await Transcript().add(backend, user("one?"))
    prompt = await transcript.prompt(backend)
    for tokens, finish in (((a, b, end), "stop"), ((a, b), "length")):
        answered = await transcript.answered(backend, prompt, said("ab", tokens, cast(FinishReason, finish)))
        assert answered.tokens[: len(prompt) + 2] == (*prompt, a, b)
        assert answered.tokens[len(prompt) + 2] == end
        assert answered.tokens.count(end) - prompt.count(end) == 1
        following = await answered.add(backend, user("two?"))
        assert following.tokens[: len(answered.tokens)] == answered.tokens
        rendered = chat.history(following.chat)
        assert "".join(chat.decode(following.tokens).split()) == "".join(chat.decode(rendered).split())
        assert following.tokens != rendered


async def test_a_stop_string_within_tokens_of_another_cut_stays() -> None:
    backend, chat = tokens_of("chatml"), templated("chatml")
    a, b, stop = chat.encode("a") + chat.encode("b") + chat.encode("!")
    transcript = await Transcript().add(backend, user("one?"))
    prompt = await transcript.prompt(backend)
    answered = await transcript.answered(backend, prompt, said("ab", (a, b, stop)))
    assert chat.decode(answered.tokens[len(prompt) :]) == "ab!<|im_end|>\n"


async def test_the_closing_is_found_once() -> None:
    backend = Tokens(templated("llama"))
    transcript = await Transcript().add(cast(Backend, backend), user("one?"))
    costs = []
    for _ in range(3):
        prompt = await transcript.prompt(cast(Backend, backend))
        before = backend.asked
        transcript = await transcript.answered(cast(Backend, backend), prompt, said("x", (1,), "length"))
        costs.append(backend.asked - before)
        transcript = await transcript.add(cast(Backend, backend), user("on"))
    assert costs == [2, 0, 0]


# ---------------------------------------------------------------------- turns


async def test_system_turns_stand_where_the_template_has_them_or_are_refused() -> None:
    system = Message(role="system", content="Be brief.")
    for name in ("chatml", "llama", "mistral", "plain"):
        backend, chat = tokens_of(name), templated(name)
        one_by_one = await Transcript().add(backend, system)
        one_by_one = await one_by_one.add(backend, user("one?"))
        assert one_by_one.tokens == chat.history(one_by_one.chat)
        assert one_by_one == await Transcript.of(backend, Chat(messages=(system, user("one?"))))
        assert chat.decode(one_by_one.tokens).count("Be brief.") == 1
    with pytest.raises(InputError, match="System role not supported"):
        await Transcript.of(tokens_of("gemma"), Chat(messages=(system, user("one?"))))


async def test_turns_that_do_not_alternate_are_refused_where_the_template_refuses_them() -> None:
    for name in ("gemma", "mistral"):
        with pytest.raises(InputError, match="alternate"):
            await Transcript().add(tokens_of(name), user("one?"), user("two?"))
    twice = await Transcript().add(tokens_of("chatml"), user("one?"), user("two?"))
    assert len(twice.ends) == 2


async def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    backend = tokens_of("wandering")
    start = await Transcript().add(backend, Message(role="system", content="Be brief."), user("one?"))
    with pytest.raises(InputError, match="rewrites earlier turns when one is added"):
        await start.add(backend, told("yes"))
    prompt = await start.prompt(backend)
    answered = await start.answered(backend, prompt, said("x", (1,), "length"))
    with pytest.raises(InputError, match="rewrites earlier turns when an instruction is added"):
        await start.instructed(backend, start.chat.instructed("Well?", {}))
    assert (await answered.add(backend, user("two?"))).tokens[: len(answered.tokens)] == answered.tokens, (
        "the rendering of the answer alone is what the next turn is added to"
    )


async def test_documents_are_placed_once_in_the_turn_that_they_belong_to() -> None:
    for name in KEPT:
        backend, chat = tokens_of(name), templated(name)
        given = Chat(messages=(user("one?"), told("yes"), user("two?")), documents=(PASSAGE,))
        transcript = await Transcript.of(backend, given)
        assert transcript.tokens == chat.history(given)
        assert transcript.messages[2].documents == (PASSAGE,)
        assert transcript.chat.documents == ()
        assert chat.decode(transcript.tokens).count(PASSAGE.text) == 1
        further = await transcript.add(backend, told("no"), user("three?"))
        assert further.tokens[: len(transcript.tokens)] == transcript.tokens
        assert chat.decode(further.tokens).count(PASSAGE.text) == 1
    with pytest.raises(InputError, match="need a user message"):
        await Transcript.of(tokens_of("chatml"), Chat(messages=(told("yes"),), documents=(PASSAGE,)))


async def test_documents_of_the_turn_and_of_the_chat_stand_together() -> None:
    other = Document(text="It was automated in 1998.")
    given = Chat(messages=(user("one?", PASSAGE), told("yes"), user("two?", other)), documents=(PASSAGE,))
    transcript = await Transcript.of(tokens_of("chatml"), given)
    assert transcript.messages[2].documents == (other, PASSAGE)
    assert transcript.tokens == templated("chatml").history(given)


async def test_until_goes_back_to_the_last_turn_of_a_role() -> None:
    backend, chat = tokens_of("llama"), templated("llama")
    messages = (Message(role="system", content="s"), user("one?"), told("yes"), user("two?"), told("no"))
    whole = await Transcript.of(backend, Chat(messages=messages))
    assert whole.until("assistant") is whole
    for role, count in (("user", 4), ("system", 1)):
        cut = whole.until(role)
        assert cut == await Transcript.of(backend, Chat(messages=messages[:count]))
        assert cut.ends == whole.ends[:count]
    back = whole.until("user").until("assistant")
    assert back.messages == messages[:3]
    assert back.tokens == chat.history(Chat(messages=messages[:3]))
    with pytest.raises(InputError, match="no tool turn"):
        whole.until("tool")
    # It can be gone on with.
    assert (await back.add(backend, user("two?"))).tokens == whole.until("user").tokens


async def test_an_instruction_stands_behind_what_is_held_with_and_without_the_header() -> None:
    for name in KEPT:
        backend, chat = tokens_of(name), templated(name)
        a, b = chat.encode("a") + chat.encode("b")
        asked = await Transcript().add(backend, user("one?"))
        held = await asked.answered(backend, await asked.prompt(backend), said("ab", (a, b), "length"))
        with_header, without = await held.instructed(backend, held.chat.instructed("Is {last_message} so?", {}))
        assert with_header[: len(held.tokens)] == without[: len(held.tokens)] == held.tokens
        assert with_header[: len(without)] == without
        added = await held.add(backend, user("Is ab so?"))
        assert (without, with_header) == (added.tokens, await added.prompt(backend))


async def test_misuse_is_named() -> None:
    backend = tokens_of("chatml")
    empty = Transcript()
    with pytest.raises(InputError, match="no user turn"):
        await empty.prompt(backend)
    with pytest.raises(InputError, match="nothing to judge"):
        _ = empty.chat
    with pytest.raises(InputError, match="no user turn"):
        await (await empty.add(backend, user("one?"), told("yes"))).prompt(backend)
    chat = Chat(messages=(user("one?"),))
    for more in ({"appended": (user("two?"),)}, {"tools": ({"name": "t"},)}, {"template_arguments": {"x": 1}}):
        with pytest.raises(InputError, match="messages and documents alone"):
            await Transcript.of(backend, chat.model_copy(update=more))


# ---------------------------------------------------------------------- on an engine


def engine_of(chat: ChatTokenizer) -> AsyncEngine:
    return AsyncEngine(prepare(copy.deepcopy(tiny_llama()), chat, name="tiny"))


@pytest.fixture(params=KEPT)
async def engine(request: pytest.FixtureRequest) -> AsyncIterator[AsyncEngine]:
    engine = engine_of(templated(request.param))
    yield engine
    await check_idle(engine)
    await engine.aclose()


def shared(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


async def as_from_scratch(engine: AsyncEngine, completions: Sequence[Completion]) -> None:
    """Answers have the logprobs that they have where nothing is held."""
    requests = [Request(prompt=completion.prompt_token_ids) for completion in completions]
    warm = [await engine.score(r, [c.token_ids]) for r, c in zip(requests, completions, strict=True)]
    for request, completion, reused in zip(requests, completions, warm, strict=True):
        await engine.clear_cache()
        fresh = await engine.score(request, [completion.token_ids])
        assert (reused.usage.computed_tokens, fresh.usage.cached_tokens) == (1, 0)
        assert reused.logprobs[0] == pytest.approx(fresh.logprobs[0], abs=1e-3)


async def test_every_turn_reuses_all_that_was_computed_and_is_as_from_scratch(engine: AsyncEngine) -> None:
    found = await first_answer(engine)
    params = [
        SamplingParams(max_tokens=12, ignore_eos=True, stop=(found[len(found) // 2 :][:2],)),
        SamplingParams(max_tokens=6),
        SamplingParams(max_tokens=30, temperature=1.5, seed=3),
        SamplingParams(max_tokens=1),
    ]
    transcript = Transcript()
    computed: tuple[int, ...] = ()
    completions = []
    for number, each in enumerate(params):
        transcript = await transcript.add(engine, user(f"and {number}?", PASSAGE))
        transcript, completion = await answer(engine, transcript, each)
        prompt = completion.prompt_token_ids
        assert completion.usage.cached_tokens == shared(prompt, computed)
        assert transcript.tokens[: len(prompt)] == prompt
        computed = (*prompt, *completion.token_ids[:-1])
        completions.append(completion)
        if completion.choices[0].finish_reason == "length":
            assert transcript.tokens[: len(computed)] == computed, "an answer is held as it was computed"
        assert transcript.messages[-1].content == completion.text
    assert completions[0].choices[0].finish_reason == "stop"
    await as_from_scratch(engine, completions)


async def first_answer(engine: AsyncEngine) -> str:
    start = await Transcript().add(engine, user("and 0?", PASSAGE))
    _, completion = await answer(engine, start, SamplingParams(max_tokens=12, ignore_eos=True))
    await engine.clear_cache()
    return completion.text


async def test_an_end_that_is_not_the_templates_gives_way_to_the_one_that_is() -> None:
    chat = tiny_chat()
    params = SamplingParams(max_tokens=8, temperature=0.7, seed=4)  # one whose text is tokenized as it was written
    plain = engine_of(chat)
    start = await Transcript().add(plain, user("a"))
    _, completion = await answer(plain, start, params)
    await plain.aclose()
    tokens = completion.token_ids
    assert chat.encode(chat.decode(tokens[:3])) == tokens[:3]
    assert tokens[3] not in tokens[:3]
    # In another engine this is a token that ends an answer.
    engine = engine_of(dataclasses.replace(chat, eos_token_ids=chat.eos_token_ids | {tokens[3]}))
    transcript, ended = await answer(engine, start, params)
    assert ended.token_ids == tokens[:4]
    assert ended.choices[0].finish_reason == "stop"
    assert transcript.tokens == (*ended.prompt_token_ids, *tokens[:3], *chat.encode("<|im_end|>\n"))
    again = await transcript.add(engine, user("and?"))
    _, completion = await answer(engine, again, SamplingParams(max_tokens=1))
    assert completion.usage.cached_tokens == len(ended.prompt_token_ids) + 3, "all that the answer computed"
    await engine.aclose()


def test_a_conversation_holds_the_same_as_a_transcript() -> None:
    with Engine(tiny_engine(tiny_llama())) as engine:
        talk = engine.conversation("be brief")

        async def told_alone() -> Transcript:
            transcript = await Transcript().add(engine.aio, Message(role="system", content="be brief"))
            for number in range(3):
                transcript = await transcript.add(engine.aio, user(f"and {number}?", PASSAGE))
                params = SamplingParams(max_tokens=9, temperature=1.0, seed=number)
                transcript, _ = await answer(engine.aio, transcript, params)
            return transcript

        for number in range(3):
            talk.user(f"and {number}?", [PASSAGE])
            talk.reply(max_tokens=9, temperature=1.0, seed=number)
        assert engine.portal.run(told_alone()) == talk.transcript
        assert talk.branch().transcript is talk.transcript


async def test_a_transcript_is_a_value(engine: AsyncEngine) -> None:
    start = await Transcript().add(engine, user("hello"))
    left, _ = await answer(engine, start, SamplingParams(max_tokens=4))
    right, completion = await answer(engine, start, SamplingParams(max_tokens=4, temperature=2.0, seed=1))
    assert start.messages == (user("hello"),)
    assert left.messages[:1] == right.messages[:1] == start.messages
    assert completion.usage.computed_tokens == 1, "the last token of the prompt, whose logits are sampled from"
    with pytest.raises(dataclasses.FrozenInstanceError):
        cast(Any, start).tokens = ()
