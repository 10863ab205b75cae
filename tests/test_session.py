"""The Python face on a tiny model: conversations hold the tokens that were computed."""

from __future__ import annotations

import asyncio
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import midstream
from midstream.errors import InputError
from midstream.history import find_parting
from midstream.session import Conversation, Engine
from midstream.types import Chat, Document, Message, Request
from tests.helpers import SEVEN, make_adapter_folder, tiny_llama
from tests.tiny import tiny_chat, tiny_engine

LABELS = 'model: null\nresponse_format: \'{"type": "string", "enum": ["yes", "no"]}\'\ntransformations: null\n'


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    model = tiny_llama()
    with Engine(tiny_engine(model)) as engine:
        for name, text in (("guard", "<|im_start|>guard\n"), ("check", "<|im_start|>check\n")):
            invocation = tiny_chat().encode(text)
            folder = make_adapter_folder(model, tmp_path / name, targets=SEVEN, invocation=invocation)
            (folder / "io.yaml").write_text(LABELS)
            reads = "user" if name == "guard" else "any"
            (folder / "midstream.json").write_text(
                f'{{"format": 1, "invocation_text": "<|im_start|>{name}\\n", "reads": "{reads}"}}'
            )
            engine.load_adapter(folder)
        yield engine
        engine.portal.run(engine.aio.check_integrity())


def test_a_call_after_a_reply_computes_the_invocation_and_nothing_else(engine: Engine) -> None:
    talk = engine.conversation()
    talk.user("hello", [Document(text="a passage", title="T")])
    assert "Document [1]: T\na passage\n\nhello" in tiny_chat().decode(talk.token_ids)
    reply = talk.reply(max_tokens=9)
    assert talk.messages[-1].content == reply.text
    history = talk.token_ids
    for name in ("guard", "check"):
        result = talk.call(name)
        assert result.result in ("yes", "no")
        assert sum((result.probabilities or {}).values()) == pytest.approx(1)
        assert result.usage.computed_tokens == len(tiny_chat().encode(f"<|im_start|>{name}\n"))
        assert result.usage.forwards == 1
    assert talk.token_ids == history, "a call does not end up in the history"
    assert talk.call("check").activation_index == len(history)
    assert (talk.call("guard").activation_index or 0) < len(history), "it judges the user's turn"


def test_a_coroutine_is_run_to_its_end(engine: Engine) -> None:
    assert engine.run(engine.aio.tokenize("hello")) == tuple(tiny_chat().encode("hello"))
    with pytest.raises(InputError, match="empty"):
        engine.run(engine.aio.complete(Request(prompt=())))


def test_the_next_turn_reuses_all_of_the_last_one(engine: Engine) -> None:
    talk = engine.conversation("be brief")
    talk.user("hello")
    talk.reply(max_tokens=12)
    before = len(talk.token_ids)
    talk.user("and then?")
    usage = talk.reply(max_tokens=3).completion.usage
    assert usage.cached_tokens >= before - 1


def test_the_answer_is_kept_as_its_tokens_and_a_parting_is_told(engine: Engine) -> None:
    talk = engine.conversation()
    talk.user("hello")
    reply = talk.reply(max_tokens=20, temperature=1.5, seed=1)
    answer = reply.completion.token_ids
    start = len(reply.completion.prompt_token_ids)
    assert talk.token_ids[start : start + len(answer)] == answer
    # Random tokens rarely are what the tokenizer would make of their text.
    assert reply.parting is not None
    assert reply.parting.at >= start
    assert "token" in reply.parting.reason


def test_an_instruction_stands_behind_the_tokens_that_are_held(engine: Engine) -> None:
    _give_contract(engine, "instruction: 'Well?'\n")
    talk = engine.conversation()
    talk.user("hello")
    talk.reply(max_tokens=20, temperature=1.5, seed=1)
    assert talk.parting() is not None, "rendering it anew would lose the answer"
    held = talk.token_ids
    result = talk.call("check")
    prompt = result.completion.prompt_token_ids
    assert prompt[: len(held)] == held
    assert tiny_chat().decode(prompt[len(held) :]) == "<|im_start|>user\nWell?<|im_end|>\n<|im_start|>check\n"
    assert result.usage.computed_tokens == len(prompt) - len(held)
    assert result.parting is None


def test_a_call_that_rewrites_the_history_says_where_the_prefix_was_lost(engine: Engine) -> None:
    _give_contract(engine, "sentence_boundaries: {last_message: c}\n")
    talk = engine.conversation()
    talk.user("hello")
    talk.reply(max_tokens=20, temperature=1.5, seed=1)
    result = talk.call("check")
    assert result.parting is not None
    assert result.usage.cached_tokens <= result.parting.at
    assert talk.call("guard").parting is None


def _give_contract(engine: Engine, more: str) -> None:
    folder = Path(next(info for info in engine.adapters() if info.name == "check").path)
    (folder / "io.yaml").write_text(LABELS + more)
    engine.load_adapter(folder, name="check")


def test_the_reason_of_a_parting() -> None:
    decode = {1: "a", 2: "b", 3: "ab", 4: " ", 5: "c"}
    text = lambda ids: "".join(decode[i] for i in ids)  # noqa: E731
    assert find_parting((1, 2), (1, 2, 5), text) is None
    assert "other tokens" in find_parting((1, 2), (3,), text).reason  # type: ignore[union-attr]
    assert "white space" in find_parting((5, 4, 1), (5, 1), text).reason  # type: ignore[union-attr]
    parting = find_parting((5, 1, 1), (5, 2, 1), text)
    assert parting is not None
    assert parting.at == 1
    assert "template" in parting.reason


def test_branches_go_their_own_ways_without_copying(engine: Engine) -> None:
    talk = engine.conversation()
    talk.user("hello")
    talk.reply(max_tokens=5)
    other = talk.branch()
    other.user("left")
    talk.user("right")
    shared = len(talk.messages) - 1
    assert talk.messages[:shared] == other.messages[:shared]
    assert other.reply(max_tokens=2).completion.usage.cached_tokens > 10
    assert talk.reply(max_tokens=2).completion.usage.cached_tokens > 10


def test_keep_puts_the_call_into_the_history_and_the_base_model_re_reads_it(engine: Engine) -> None:
    talk = engine.conversation()
    talk.user("hello")
    before = talk.token_ids
    result = talk.call("check", keep=True)
    assert talk.messages[-1].content == result.completion.text
    assert talk.token_ids[: len(before)] == before
    talk.user("go on")
    usage = talk.reply(max_tokens=2).completion.usage
    assert usage.cached_tokens == len(before)


def test_fan_out_gives_results_in_order_and_errors_in_place(engine: Engine) -> None:
    talk = Conversation.from_chat(engine, Chat(messages=(Message(role="user", content="x"),)))
    names = [
        r.intrinsic if not isinstance(r, Exception) else type(r).__name__
        for r in talk.call_many(["check", "no", "guard"])
    ]
    assert names == ["check", "AdapterNotFound", "guard"]


def test_the_caller_may_mix_event_loops_and_blocking_calls(engine: Engine) -> None:
    talk = engine.conversation()
    talk.user("hello")
    asyncio.run(talk.areply(max_tokens=4))
    assert talk.call("guard").result in ("yes", "no")
    talk.user("more")
    talk.reply(max_tokens=4)
    assert asyncio.run(talk.acall("guard")).result in ("yes", "no")


def test_misuse_is_named(engine: Engine) -> None:
    talk = engine.conversation()
    with pytest.raises(InputError, match="no user turn"):
        talk.reply()
    with pytest.raises(InputError, match="empty"):
        talk.call("check")
    talk.user("x")
    with pytest.raises(InputError, match="branch"):
        talk.reply(n=2)


def test_public_names_are_exported_once_and_importing_is_light() -> None:
    assert sorted(midstream.__all__) == midstream.__all__
    assert len(set(midstream.__all__)) == len(midstream.__all__)
    for name in midstream.__all__:
        assert getattr(midstream, name) is not None
    for package in ("adapters", "intrinsics"):
        module = importlib.import_module(f"midstream.{package}")
        assert all(hasattr(module, name) for name in module.__all__)
    code = "import sys, midstream; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
