"""Contracts, and calls through a backend that only records."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from midstream.backend import Backend
from midstream.errors import AdapterNotFound, ContractError, InputError, MidstreamError, OutputError
from midstream.intrinsics import call_intrinsics, load_contract, render
from midstream.types import AdapterInfo, Chat, Choice, Completion, JsonSchema, Message, Request
from tests.intrinsics.backends import Answering

CHAT = Chat(messages=(Message(role="user", content="one"), Message(role="assistant", content="two")))


def info(folder: Path, name: str = "check", reads: str = "any") -> AdapterInfo:
    path = folder / "io.yaml"
    text = path.read_text() if path.is_file() else None
    return AdapterInfo(name, "alora", "d", str(folder), (7, 8), "<c>", 4, 10, contract=text, metadata={"reads": reads})


def contract(folder: Path, text: str) -> Path:
    (folder / "io.yaml").write_text(text)
    return folder


class Recorder(Answering):
    """Answers with a fixed text that is certain. `tokens` are those of every chat; CHAT has the first `shared`."""

    def __init__(
        self, infos: Sequence[AdapterInfo], text: str, tokens: tuple[int, ...] = (1, 2), shared: int = 1
    ) -> None:
        super().__init__(infos, text, shares={text: 1.0})
        self._chat, self._shared = tokens, shared

    async def tokenize(self, prompt: str | Chat, *, header: bool = True) -> tuple[int, ...]:
        return self._chat if prompt != CHAT else self._chat[: self._shared]


LABELS = """
model: base
response_format: '{"type": "string", "enum": ["yes", "no"]}'
transformations: null
parameters: {max_completion_tokens: 9}
"""


async def test_a_label_contract_becomes_a_choice_and_a_json_result(tmp_path: Path) -> None:
    backend = Recorder([info(contract(tmp_path, LABELS), reads="user")], '"yes"')
    assert isinstance(backend, Backend)
    (result,) = await call_intrinsics(backend, ["check"], CHAT)
    assert result.as_dict() == {
        "intrinsic": "check",
        "result": "yes",
        "probabilities": {"yes": 1.0},
        "usage": {"prompt_tokens": 9, "cached_tokens": 7, "computed_tokens": 2, "completion_tokens": 1, "forwards": 1},
        "activation_index": 7,
        "seconds": 0.1,
    }
    (request,) = backend.requests
    assert request.params.constraint == Choice(options=('"yes"', '"no"'))
    assert request.params.max_tokens == 9
    assert request.invoke
    assert request.prompt == Chat(messages=CHAT.messages[:1]), "it judges the user's turn"


async def test_one_that_fails_leaves_the_others_their_results_in_order(tmp_path: Path) -> None:
    backend = Recorder([info(contract(tmp_path, LABELS))], '"yes"')
    good, missing = await call_intrinsics(backend, ["check", "nobody"], CHAT)
    assert good.result == "yes"
    assert isinstance(missing, AdapterNotFound)


class Broken(Recorder):
    """Fails for one adapter with what no error of ours is."""

    async def complete(self, request: Request) -> Completion:
        if request.adapter == "broken":
            raise KeyError("private text")
        return await super().complete(request)


async def test_a_fault_of_the_program_leaves_the_others_their_results_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = contract(tmp_path, LABELS)
    backend = Broken([info(folder), info(folder, "broken")], '"yes"')
    with caplog.at_level(logging.ERROR, logger="midstream.intrinsics"):
        error, good = await call_intrinsics(backend, ["broken", "check"], CHAT)
    assert good.result == "yes"
    assert isinstance(error, MidstreamError)
    assert (error.status, error.code) == (500, "internal_error")
    assert "broken" in str(error)
    assert "private text" not in str(error)
    (record,) = caplog.records
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], KeyError)


async def test_output_that_does_not_fit_shows_both(tmp_path: Path) -> None:
    """Fault 9: output parsed against a schema that has drifted is an error, never a quiet default."""
    schema = '{"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}'
    text = f"model: null\nresponse_format: '{schema}'\ntransformations: null\n"
    backend = Recorder([info(contract(tmp_path, text))], '{"okay": true}')
    (error,) = await call_intrinsics(backend, ["check"], CHAT)
    assert isinstance(error, OutputError)
    assert "okay" in str(error)
    assert '"required": ["ok"]' in str(error)
    assert isinstance(backend.requests[0].params.constraint, JsonSchema)


async def test_an_instruction_is_appended_and_its_arguments_are_needed(tmp_path: Path) -> None:
    text = (
        "model: null\nresponse_format: null\ntransformations: null\ninstruction: 'Is {{this}} {what}? {last_message}'\n"
    )
    backend = Recorder([info(contract(tmp_path, text))], "plain")
    (result,) = await call_intrinsics(backend, ["check"], CHAT, {"check": {"what": "met"}})
    assert result.result == "plain"
    sent = backend.requests[0].prompt
    assert isinstance(sent, Chat)
    assert sent.messages[:2] == CHAT.messages
    assert sent.appended[0].content == "Is {this} met? two"
    (error,) = await call_intrinsics(backend, ["check"], CHAT)
    assert isinstance(error, InputError)
    backend = Recorder(backend.infos, "plain", tokens=(1, 7, 8, 2))
    await call_intrinsics(backend, ["check"], CHAT, {"check": {"what": "met"}})
    assert backend.requests[0].prompt == (1, 7, 8, 2), "the invocation is in the rendered prompt already"
    backend = Recorder(backend.infos, "plain", tokens=(1, 7, 8, 2), shared=3)
    await call_intrinsics(backend, ["check"], CHAT, {"check": {"what": "met"}})
    assert backend.requests[0].invoke, "one that an earlier turn quotes does not count"


class Slow(Recorder):
    """Keeps what it is to tokenize, and lets others go on meanwhile."""

    tokenized: list[Chat]

    async def tokenize(self, prompt: str | Chat, *, header: bool = True) -> tuple[int, ...]:
        assert isinstance(prompt, Chat)
        self.tokenized.append(prompt)
        await asyncio.sleep(0)
        return await super().tokenize(prompt)


async def test_a_history_is_tokenized_once_for_all_and_only_where_it_decides(tmp_path: Path) -> None:
    text = "model: null\nresponse_format: null\ntransformations: null\ninstruction: 'Check: {last_message}'\n"
    folder = contract(tmp_path, text)
    names = ["one", "two", "three"]
    for tokens, expected in (((1, 7, 8, 2), 1), ((1, 2), 0)):
        backend = Slow([info(folder, name) for name in names], "plain", tokens=tokens)
        backend.tokenized = []
        results = await call_intrinsics(backend, names, CHAT)
        assert [result.result for result in results] == ["plain"] * 3
        assert sum(not chat.appended for chat in backend.tokenized) == expected
        assert sum(bool(chat.appended) for chat in backend.tokenized) == 3


@pytest.mark.parametrize("slow", ["rewrite_chat", "instruct", "find_last"])
async def test_work_on_a_long_conversation_does_not_hold_the_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: str
) -> None:
    text = "model: null\nresponse_format: null\ntransformations: null\ninstruction: 'Check: {last_message}'\n"
    backend = Recorder([info(contract(tmp_path, text))], "plain")
    real, threads = getattr(render, slow), []

    def spied(*given: Any) -> Any:
        threads.append(threading.current_thread())
        return real(*given)

    monkeypatch.setattr(render, slow, spied)
    await call_intrinsics(backend, ["check"], CHAT)
    assert threads
    assert threading.current_thread() not in threads


@pytest.mark.parametrize("given", [{"what": "a", "extra": 1}, {"what": "a", "last_message": "b"}])
async def test_arguments_that_the_instruction_does_not_have_are_errors(given: dict[str, str], tmp_path: Path) -> None:
    text = "model: null\nresponse_format: null\ntransformations: null\ninstruction: 'Is it {what}? {last_message}'\n"
    backend = Recorder([info(contract(tmp_path, text))], "plain")
    (error,) = await call_intrinsics(backend, ["check"], CHAT, {"check": given})
    assert isinstance(error, InputError)
    assert "its arguments: what" in str(error)


async def test_an_instruction_stands_after_the_turn_that_is_judged(tmp_path: Path) -> None:
    text = "model: null\nresponse_format: null\ntransformations: null\ninstruction: 'Check: {last_message}'\n"
    backend = Recorder([info(contract(tmp_path, text), reads="user")], "plain")
    await call_intrinsics(backend, ["check"], CHAT)
    sent = backend.requests[0].prompt
    assert isinstance(sent, Chat)
    assert [message.content for message in (*sent.messages, *sent.appended)] == ["one", "Check: one"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("model: x\nnonsense: 3\n", "nonsense"),
        ("response_format: '['\n", "response_format"),
        ("- a\n", "file"),
        ("a: [\n", "cannot be read"),
        (
            "model: x\nresponse_format: null\ntransformations: [{type: likelihood}]\n",
            "categories_to_values: Field required",
        ),
        ("model: x\nresponse_format: null\n", "lacks transformations"),
        ('model: x\nresponse_format: \'{"type": "strng"}\'\ntransformations: null\n', "not a JSON schema"),
    ],
)
def test_a_contract_that_cannot_be_carried_out_is_refused(text: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ContractError, match=reason):
        load_contract(info(contract(tmp_path, text)))


def test_a_folder_without_a_contract_gives_plain_text(tmp_path: Path) -> None:
    empty = load_contract(info(tmp_path))
    assert empty.constraint() is None


async def test_arguments_nobody_takes_and_turns_nobody_took_are_errors(tmp_path: Path) -> None:
    backend = Recorder([info(tmp_path, reads="assistant"), info(tmp_path, "other")], "x")
    only_user = Chat(messages=CHAT.messages[:1])
    first, second = await call_intrinsics(backend, ["check", "other"], only_user, {"other": {"a": 1}})
    assert "judges assistant turns" in str(first)
    assert "takes no arguments" in str(second)


def test_errors_of_any_kind_carry_a_status_and_a_code() -> None:
    from midstream import errors

    kinds: list[Any] = [
        k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, errors.MidstreamError)
    ]
    assert len(kinds) > 15
    for kind in kinds:
        assert 400 <= kind.status < 600
        assert kind.code
