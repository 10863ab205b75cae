"""Adapters that the base model's own output invokes: PEFT's answers, the base model's own words, nothing read twice."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from midstream.adapters.activation import find_last
from midstream.engine.engine import AsyncEngine
from midstream.engine.output import OutputWriter
from midstream.engine.request import Branch, Job
from midstream.types import Choice, Invocable, Regex, Request, SamplingParams
from tests.engine.invoked import (
    EOS,
    TEXT,
    TURN_END,
    Watch,
    compare,
    invocable,
    running,
    sampled,
    tokens,
    verify,
    writing,
)
from tests.helpers import SEVEN, make_adapter_folder
from tests.reference import greedy, logits, peft_model
from tests.tiny import tiny_chat, tiny_engine


async def own_words(engine: AsyncEngine, count: int) -> tuple[int, ...]:
    params = SamplingParams(max_tokens=count, ignore_eos=True)
    return (await engine.complete(Request(prompt=TEXT, params=params))).token_ids


# ---------------------------------------------------------------------- the same as from scratch


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("closing", [(), (5, EOS, 6)])
@pytest.mark.parametrize("step_tokens", [3, 512])
async def test_a_call_in_free_text_equals_peft_and_the_base_goes_on_as_from_scratch(
    model: Any, tmp_path: Path, width: int, closing: tuple[int, ...], step_tokens: int
) -> None:
    """The invocation is what the base model likes to write by itself, so that no constraint leads it there."""
    engine = tiny_engine(model, max_step_tokens=step_tokens)
    watch = Watch(engine)
    try:
        words = await own_words(engine, 12)
        start = next(i for i in range(4, 10) if find_last(words[: i + width - 1], words[i : i + width]) is None)
        invocation = words[start : start + width]
        folder = make_adapter_folder(model, tmp_path / "own", seed=5, targets=SEVEN, invocation=invocation)
        await engine.load_adapter(folder, name="own")
        reference = peft_model(model, {"own": folder})
        await engine.clear_cache()
        watch.forget()
        params = SamplingParams(max_tokens=30, ignore_eos=True, logprobs=True)
        callee = invocable("own", closing=closing, max_tokens=5)
        done = await engine.complete(Request(prompt=TEXT, params=params, invocable=callee, max_invocations=1))
        choice, call = done.choices[0], done.choices[0].calls[0]

        assert (call.start, call.end) == (start, start + width + 5)
        assert choice.token_ids[: call.end - 5] == words[: start + width]
        assert list(call.token_ids) == greedy(reference, TEXT + words[: start + width], "own", 5)
        after = call.end + len(closing)
        assert choice.token_ids[call.end : after] == closing
        rest = choice.token_ids[after:]
        assert rest
        assert list(rest) == greedy(reference, TEXT + choice.token_ids[:after], None, len(rest))
        whole = logits(reference, TEXT + choice.token_ids)
        compare([(at, row) for job, _, at, row in watch.rows if job.caller is None], whole)
        answered = logits(reference, TEXT + choice.token_ids[: call.end], "own")
        compare([(at, row) for job, _, at, row in watch.rows if job.caller is not None], answered)

        # The adapter read the invocation and its own answer but for the last token, and nothing else.
        assert call.usage.computed_tokens == width
        assert call.usage.cached_base_tokens == call.usage.prompt_tokens - width == len(TEXT) + start
        assert watch.count(base=False) == width + 5 - 1
        # The base model read each position once: those of the call after the adapter had, its last token never.
        assert watch.count(base=True) == len(TEXT) + len(choice.token_ids) - 1
        assert done.usage.computed_tokens == done.usage.prompt_tokens == len(TEXT)
        resumed = len(TEXT) + call.start + width - 1
        read = [count for job, owner, position, count in watch.computed if owner is None and position >= resumed]
        assert sum(read) == 1 + 5 + len(closing) + len(rest) - 1
        await engine.check_integrity()
    finally:
        await engine.aclose()


async def test_what_the_base_writes_afterwards_is_what_a_fresh_engine_writes(
    calling: AsyncEngine, model: Any, callee_folders: dict[str, Path], peft: Any
) -> None:
    watch = Watch(calling)
    done = await calling.complete(writing("[a-e]{4}@c:[ -~]{6}", *invocable("check", closing=TURN_END)))
    verify(watch, peft, done)
    choice = done.choices[0]
    call = choice.calls[0]
    assert (choice.finish_reason, call.adapter) == ("stop", "check")
    after = call.end + len(TURN_END)
    assert choice.token_ids[call.end : after] == tuple(TURN_END)
    assert choice.text.endswith(tiny_chat().decode((*call.token_ids, *choice.token_ids[call.end :])))
    async with running(model, callee_folders) as fresh:
        params = SamplingParams(max_tokens=20, constraint=Regex(pattern="[ -~]{6}"))
        alone = await fresh.complete(Request(prompt=TEXT + choice.token_ids[:after], params=params))
    assert alone.token_ids == choice.token_ids[after:]


async def test_a_forced_invocation_is_read_by_the_adapter_with_what_the_base_had_not_read(calling: AsyncEngine) -> None:
    """A constraint forces `x@c:` after the sampled token: the call reads that token and the x for the base model."""
    watch = Watch(calling)
    done = await calling.complete(writing("[a-e]{4}x@c:[a-e]{3}", *invocable("check", closing=(9,))))
    call = done.choices[0].calls[0]
    usage = call.usage
    assert (usage.computed_tokens, usage.cached_tokens, usage.cached_adapter_tokens) == (5, len(TEXT) + 3, 0)
    assert usage.prompt_tokens == len(TEXT) + 8
    # The base model then reads the whole invocation, the answer and the closing.
    resumed = len(TEXT) + call.start
    assert watch.count(base=True, start=resumed) == 3 + 4 + 1 + 3 - 1
    assert watch.count(base=True) == len(TEXT) + len(done.token_ids) - 1


async def test_several_calls_of_two_adapters_in_one_answer(calling: AsyncEngine, peft: Any) -> None:
    watch = Watch(calling)
    done = await calling.complete(writing("[a-e]{3}@c:[f-j]{2}@r:[a-e]{2}@c:[k-o]{3}"))
    verify(watch, peft, done)
    choice = done.choices[0]
    assert [call.adapter for call in choice.calls] == ["check", "rate", "check"]
    for one, other in zip(choice.calls, choice.calls[1:], strict=False):
        assert one.end <= other.start
    assert len(choice.token_ids) == 3 + 3 + 4 + 2 + 3 + 4 + 2 + 3 + 4 + 3
    assert done.usage.computed_tokens == len(TEXT)
    assert all(call.finish_reason == "length" for call in choice.calls)
    again = await calling.complete(writing("[a-e]{3}@c:[f-j]{2}@r:[a-e]{2}@c:[k-o]{3}"))
    assert again.choices[0].token_ids == choice.token_ids
    assert again.usage.cached_base_tokens == len(TEXT) - 1
    assert all(call.usage.cached_adapter_tokens == len("@c:") - 1 for call in again.choices[0].calls)


async def test_a_turn_header_as_the_invocation_and_a_label_as_the_answer(calling: AsyncEngine, peft: Any) -> None:
    """The label's probabilities are the adapter's own, and cost one forward."""
    watch = Watch(calling)
    option = "so<|im_start|>judge\n"
    label = Choice(options=('"yes"', '"no"'))
    params = SamplingParams(constraint=Choice(options=(option,)), max_tokens=40)
    callee = Invocable(adapter="turn", params=SamplingParams(constraint=label), closing=TURN_END)
    done = await calling.complete(Request(prompt=TEXT, params=params, invocable=(callee,)))
    call = done.choices[0].calls[0]
    assert done.text == option + call.text + tiny_chat().decode(TURN_END)
    assert done.choices[0].finish_reason == "stop"
    assert call.text in label.options
    asked = (*TEXT, *tokens(option), *tokens('"'))
    row = logits(peft, asked, "turn")[-1][[tokens("y")[0], tokens("n")[0]]].softmax(-1).tolist()
    assert call.probabilities == pytest.approx({'"yes"': row[0], '"no"': row[1]}, abs=1e-4)
    assert call.usage.forwards == 1
    # The base model's text was forced whole, so that it read nothing itself.
    assert (done.usage.forwards, done.usage.cached_tokens, done.usage.computed_tokens) == (0, 0, 0)
    assert watch.count(base=True) == len(TEXT) + 2


async def test_300_answers_that_are_forced_whole_need_no_forward_and_no_stack(calling: AsyncEngine) -> None:
    callee = invocable("check", constraint=Choice(options=("ok",)))
    constraint = Choice(options=("@c:" * 300,))
    params = SamplingParams(max_tokens=1600, constraint=constraint, logprobs=True)
    done = await calling.complete(Request(prompt=TEXT, params=params, invocable=callee, max_invocations=300))
    assert done.text == "@c:ok" * 300
    assert (done.choices[0].finish_reason, done.usage.forwards) == ("stop", 0)
    assert {call.usage.forwards for call in done.choices[0].calls} == {0}


async def test_an_answers_end_of_sequence_token_is_not_inserted_and_one_in_the_closing_ends_nothing(
    calling: AsyncEngine, peft: Any
) -> None:
    watch = Watch(calling)
    ended = 0
    for seed in range(6):
        watch.forget()
        callee = invocable("check", constraint=Choice(options=("y", "yy")), temperature=9.0, seed=seed, closing=(EOS,))
        done = await calling.complete(writing("[a-e]{2}@c:[a-e]{3}", *callee))
        call = done.choices[0].calls[0]
        assert call.text in ("y", "yy")
        assert call.token_ids == tokens(call.text)
        ended += call.text == "y"
        assert done.text[2:] == "@c:" + call.text + "<|im_end|>" + done.text[-3:]
        verify(watch, peft, done)
    assert ended, "no answer ended with the token"


async def test_an_empty_answer_lets_the_base_model_go_on(calling: AsyncEngine, peft: Any) -> None:
    watch = Watch(calling)
    empty = 0
    for seed in range(6):
        watch.forget()
        callee = invocable("check", constraint=Regex(pattern="a?"), temperature=9.0, seed=seed)
        done = await calling.complete(writing("[a-e]{2}@c:[a-e]{3}", *callee))
        verify(watch, peft, done)
        call = done.choices[0].calls[0]
        assert done.text[2:] == "@c:" + call.text + done.text[-3:]
        assert call.end - call.start == 3 + len(call.token_ids)
        empty += not call.token_ids
    assert empty, "no answer was empty"


async def test_an_answer_invokes_nobody_and_keeps_the_tokens_of_its_stop_string(calling: AsyncEngine) -> None:
    callees = invocable("check", "rate", constraint=Choice(options=("a@r:b@c:c",)), stop=(":c",), max_tokens=20)
    done = await calling.complete(writing("x@c:y", *callees))
    (call,) = done.choices[0].calls
    assert (call.text, call.finish_reason) == ("a@r:b@c", "stop")
    assert done.text == "x@c:a@r:b@c:cy"


def test_a_character_that_an_answer_leaves_incomplete_is_not_completed_by_what_follows() -> None:
    """Its text has been told by then."""
    chat = tiny_chat()
    writer = OutputWriter(chat.decode, chat.eos_token_ids, chat.token_text)
    branch = Branch(Job("a", TEXT, None, None, SamplingParams(), listener=lambda _: None), 0)
    first, second, third = tokens("\u20ac")
    writer.take(branch, tokens("a")[0])
    writer.insert(branch, (first, second))
    told = branch.text
    assert told == "a\ufffd"
    for token in (third, *tokens("b")):
        writer.take(branch, token)
    assert branch.text == told + "\ufffdb"


# ---------------------------------------------------------------------- branches, streams, seeds


async def test_branches_call_on_their_own_and_seeds_repeat(calling: AsyncEngine, peft: Any) -> None:
    watch = Watch(calling)
    done = await calling.complete(sampled(3))
    verify(watch, peft, done)
    assert [len(choice.calls) for choice in done.choices] == [2] * 4
    assert len({choice.token_ids for choice in done.choices}) > 1
    assert {choice.calls[0].adapter for choice in done.choices} == {"check", "rate"}
    assert done.usage.computed_tokens == len(TEXT)
    assert done.usage.completion_tokens == sum(len(choice.token_ids) for choice in done.choices)
    await calling.clear_cache()
    again, other = await asyncio.gather(calling.complete(sampled(3)), calling.complete(sampled(4)))
    assert [c.token_ids for c in again.choices] == [c.token_ids for c in done.choices]
    assert [c.token_ids for c in other.choices] != [c.token_ids for c in done.choices]
    alone = await calling.complete(sampled(3, n=1))
    assert alone.choices[0].token_ids == done.choices[0].token_ids


async def test_the_calls_of_one_branch_draw_differently(calling: AsyncEngine) -> None:
    """Each has a seed of its own, so that equal distributions need not give equal answers."""
    seeds: dict[Job, int] = {}

    def note(step: int) -> None:
        for job in calling._core._jobs.values():
            seeds.update({call: call.branches[0].generator.initial_seed() for call in job.running_calls})

    Watch(calling, note)
    callee = invocable("check", temperature=1.0)
    await calling.complete(writing("[a-e](@c:[a-e]){4}", *callee, n=2, seed=1, temperature=1.0))
    assert len(seeds) == len(set(seeds.values())) == 8


async def test_a_stream_is_the_completion_in_pieces_and_in_order(calling: AsyncEngine) -> None:
    asked = sampled(5, n=2, logprobs=True, top_logprobs=2, stop=("zz", ";a"))
    whole = await calling.complete(asked)
    pieces = [delta async for delta in calling.stream(asked)]
    final = pieces.pop().completion
    assert final is not None
    for choice, streamed in zip(whole.choices, final.choices, strict=True):
        mine = [piece for piece in pieces if piece.index == choice.index]
        assert "".join(piece.text for piece in mine) == choice.text == streamed.text
        assert sum((piece.token_ids for piece in mine), ()) == choice.token_ids
        assert sum((piece.logprobs for piece in mine), ()) == streamed.logprobs
        assert [call.token_ids for call in streamed.calls] == [call.token_ids for call in choice.calls]
        assert len(mine) > 4, "told piece by piece"


async def test_inserted_tokens_have_logprob_zero_and_nothing_beside_them(calling: AsyncEngine) -> None:
    callee = invocable("check", closing=tokens(";"))
    done = await calling.complete(writing("[a-e]{3}@c:[a-e]{3}", *callee, logprobs=True, top_logprobs=2))
    choice = done.choices[0]
    assert choice.logprobs is not None
    assert tuple(found.token_id for found in choice.logprobs) == choice.token_ids
    inserted = range(choice.calls[0].start + 3, choice.calls[0].end + 1)
    for at, found in enumerate(choice.logprobs):
        free = at < 3 or at > inserted[-1]
        assert (len(found.top), found.logprob < 0) == ((2, True) if free else (0, False))


# ---------------------------------------------------------------------- when it calls, and when not


async def test_an_invocation_in_the_prompt_alone_calls_nobody(calling: AsyncEngine) -> None:
    prompt = TEXT + tokens("@c:")
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    done = await calling.complete(Request(prompt=prompt, params=params, invocable=invocable("check")))
    assert not done.choices[0].calls
    assert done.token_ids == (await calling.complete(Request(prompt=prompt, params=params))).token_ids
    split = Request(
        prompt=TEXT + tokens("@c"),
        params=SamplingParams(constraint=Choice(options=(":a", ":b"))),
        invocable=invocable("check"),
    )
    assert not (await calling.complete(split)).choices[0].calls


async def test_a_partial_match_is_retried(calling: AsyncEngine) -> None:
    for text, start in (("aaab", 1), ("aaaaab", 3), ("aabab", 0), ("abaab", 2)):
        done = await calling.complete(writing(text + "[x-z]", *invocable("aab")))
        assert [call.start for call in done.choices[0].calls] == [start], text


async def test_an_invocation_is_not_made_of_an_answer_and_what_follows(calling: AsyncEngine) -> None:
    """The closing `@` with the base model's own `c:` is no invocation."""
    done = await calling.complete(writing("@r:c:[a-e]{2}", *invocable("check", "rate", closing=tokens("@"))))
    assert [call.adapter for call in done.choices[0].calls] == ["rate"]


async def test_the_longest_of_two_invocations_that_end_together_is_meant(calling: AsyncEngine) -> None:
    done = await calling.complete(writing("[xy]@@c:[a-e]{2}[xy]@c:", *invocable("check", "long")))
    assert [call.adapter for call in done.choices[0].calls] == ["long", "check"]


async def test_one_call_too_many_ends_the_branch(calling: AsyncEngine, peft: Any) -> None:
    watch = Watch(calling)
    asked = writing("([a-e]@c:){5}").model_copy(update={"max_invocations": 2})
    done = await calling.complete(asked)
    verify(watch, peft, done)
    choice = done.choices[0]
    assert (len(choice.calls), choice.finish_reason) == (2, "length")
    assert len(choice.token_ids) == 2 * (4 + 4) + 4
    # Also where the invocation is the last that the constraint wants.
    last = await calling.complete(writing("([a-e]@c:){3}").model_copy(update={"max_invocations": 2}))
    assert last.choices[0].finish_reason == "length"
    assert last.token_ids == choice.token_ids


@pytest.mark.parametrize("max_tokens", range(8, 17))
async def test_what_is_inserted_counts_to_max_tokens(calling: AsyncEngine, max_tokens: int) -> None:
    """Three own tokens, the invocation's three, an answer of four, a closing of two, and three of its own again."""
    callee = invocable("check", closing=(7, 8))
    whole = await calling.complete(writing("[a-e]{3}@c:[a-e]{3}", *callee))
    done = await calling.complete(writing("[a-e]{3}@c:[a-e]{3}", *callee, max_tokens=max_tokens))
    choice = done.choices[0]
    assert choice.token_ids == whole.token_ids[:max_tokens]
    assert choice.finish_reason == ("stop" if max_tokens >= 15 else "length")
    assert len(choice.calls[0].token_ids) == min(4, max_tokens - 6)
    assert choice.calls[0].end <= max_tokens


async def test_no_room_for_a_call_ends_with_length(calling: AsyncEngine) -> None:
    done = await calling.complete(writing("[a-e]{5}@c:", *invocable("check"), max_tokens=8))
    assert (done.choices[0].finish_reason, done.choices[0].calls) == ("length", ())
    # An answer that just fits is whole, and so is the constraint's text.
    callee = invocable("check", constraint=Choice(options=("ok", "no")))
    fits = await calling.complete(writing("[a-e]{5}@c:", *callee, max_tokens=10))
    assert (fits.choices[0].finish_reason, len(fits.choices[0].calls)) == ("stop", 1)
    for max_tokens, reason in ((2, "stop"), (3, "length")):
        callee = invocable("check", max_tokens=max_tokens)
        done = await calling.complete(writing("[a-e]{5}@c:", *callee, max_tokens=10))
        assert (done.choices[0].finish_reason, len(done.choices[0].calls[0].token_ids)) == (reason, 2)


async def test_stop_strings_look_at_each_piece_of_the_base_models_own_text(calling: AsyncEngine) -> None:
    callee = invocable("check", constraint=Choice(options=("STOP",)), closing=tokens("S"))
    pattern = "[a-e]{2}@c:TOP[a-e]{2}!STOP[a-e]{2}"
    whole = await calling.complete(writing(pattern, *callee))
    done = await calling.complete(writing(pattern, *callee, stop=("STOP",)))
    assert done.text == whole.text[: whole.text.rindex("STOP")]
    assert done.text.endswith("!")
    assert "@c:STOPSTOP" in done.text
    assert done.choices[0].finish_reason == "stop"


async def test_a_stop_string_within_an_invocation_ends_the_text_before_the_call(calling: AsyncEngine) -> None:
    for stop, kept in (("@", ""), ("@c", ""), ("@c:", ""), ("c:", "@")):
        done = await calling.complete(writing("[a-e]{2}@c:[a-e]{2}", stop=(stop,)))
        assert not done.choices[0].calls
        assert (done.text[2:], done.choices[0].finish_reason) == (kept, "stop")


async def test_nothing_that_is_inserted_is_held_back_for_a_stop_string(calling: AsyncEngine) -> None:
    callee = invocable("check", constraint=Choice(options=("ok", "no")), closing=tokens("ST"))
    told, shown = "", []
    async for delta in calling.stream(writing("[a-e]{2}@c:[a-e]{4}", *callee, stop=("STOP",))):
        told += delta.text
        shown.append(told)
    assert any(text.endswith("ST") for text in shown)


async def test_an_unfinished_stop_string_before_a_call_is_told(calling: AsyncEngine) -> None:
    asked = writing("[a-e]{2}@c:[a-e]{2}", stop=("@c:@",))
    pieces = [delta async for delta in calling.stream(asked)]
    done = pieces.pop().completion
    assert done is not None
    assert len(done.choices[0].calls) == 1
    assert "".join(piece.text for piece in pieces) == done.text
