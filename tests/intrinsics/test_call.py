"""Calls that carry out a whole contract: what is sent, what comes back, and when the prefix was rewritten."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from midstream.errors import ContractError, InputError, OutputError
from midstream.intrinsics import IntrinsicResult, call_intrinsic
from midstream.types import Chat, Document, Message, TokenLogprob
from tests.intrinsics.backends import Answering, adapter
from tests.intrinsics.reference import config

CHAT = Chat(
    messages=(
        Message(role="user", content="How old?", documents=(Document(text="It stands. It is old.", doc_id="1"),)),
        Message(role="assistant", content="It is old. It stands."),
    )
)
LABELS = '{"type": "string", "enum": ["high", "low"]}'
SCORE = [
    {"type": "likelihood", "input_path": [], "categories_to_values": {"high": 1.0, "low": 0.0}},
    {"type": "nest", "input_path": [], "field_name": "score"},
]


def tokens(*pieces: str, **top: float) -> list[TokenLogprob]:
    """Tokens, of which those that are in `top` have it as alternatives."""
    others = tuple(TokenLogprob(9, value, text) for text, value in top.items())
    return [TokenLogprob(3, top.get(p, 0.0), p, others if p in top else ()) for p in pieces]


async def call(backend: Answering, chat: Any = CHAT, arguments: Mapping[str, Any] | None = None) -> IntrinsicResult:
    return await call_intrinsic(backend, backend.infos[0], chat, arguments)


async def test_a_likelihood_asks_for_probabilities_and_reads_them() -> None:
    fields = config(response_format=LABELS, transformations=SCORE)
    answer = tokens('"', "high", '"', "<end>", high=-0.2, low=-1.7)
    backend = Answering([adapter(contract=fields)], '"high"', tokens=answer, shares={'"high"': 0.8, '"low"': 0.2})
    result = await call(backend, (1, 2, 3))
    assert result.result == {"score": pytest.approx(0.8175744761936437)}
    assert result.probabilities == {"high": 0.8, "low": 0.2}
    assert "prefix_rewritten" not in result.as_dict()
    (request,) = backend.requests
    assert (request.params.logprobs, request.params.top_logprobs) == (True, 10)
    assert request.prompt == (1, 2, 3), "append only: token ids will do"


async def test_the_raw_output_must_fit_the_response_format() -> None:
    fields = config(response_format=LABELS, transformations=SCORE)
    backend = Answering([adapter(contract=fields)], '"middle"', tokens=tokens('"', "middle", '"'))
    with pytest.raises(OutputError, match=r"'\"middle\"', which does not fit .*high"):
        await call(backend)


async def test_without_a_format_transformations_need_json() -> None:
    rules = [{"type": "nest", "input_path": [], "field_name": "n"}]
    assert (await call(Answering([adapter(contract=config(transformations=rules))], "[1]"))).result == {"n": [1]}
    with pytest.raises(OutputError, match="'yes', which does not fit JSON"):
        await call(Answering([adapter(contract=config(transformations=rules))], "yes"))


async def test_a_failing_transformation_names_itself_the_path_and_the_value() -> None:
    rules = [SCORE[1], {"type": "explode", "input_path": ["score"], "target_field": "x"}]
    with pytest.raises(
        OutputError, match=r"transformation 1 \(explode\) .* at \['score'\]: .* the value there is 'low'"
    ):
        await call(Answering([adapter(contract=config(response_format=LABELS, transformations=rules))], '"low"'))


async def test_sentences_are_tagged_in_the_turn_and_decoded_in_the_answer() -> None:
    names = {"begin": "b", "end": "e", "text": "t", "document_id": "d"}
    rule = {"type": "decode_sentences", "source": "documents", "input_path": ["n"], "output_names": names}
    fields = config(transformations=[rule], sentence_boundaries={"documents": "c", "last_message": "r"})
    backend = Answering([adapter(contract=fields)], '{"n": 1}')
    result = await call(backend)
    assert result.result == {"n": 1, "b": 11, "e": 21, "t": "It is old.", "d": "1"}
    assert result.as_dict()["prefix_rewritten"] == "sentence tags in the last message and the documents"
    (request,) = backend.requests
    assert isinstance(request.prompt, Chat)
    assert request.invoke
    assert request.prompt.messages[0].documents[0].text == "<c0> It stands. <c1> It is old."
    assert request.prompt.messages[1].content == "<r0> It is old. <r1> It stands."


@pytest.mark.parametrize("form", ["string", "json", "roles"])
async def test_documents_become_messages_before_the_chat(form: str) -> None:
    backend = Answering([adapter(contract=config(docs_as_message=form, instruction="Well, {x}?"))], "yes")
    result = await call(backend, CHAT, {"x": "so"})
    assert result.prefix_rewritten == "documents as messages at the start"
    prompt = backend.requests[0].prompt
    assert isinstance(prompt, Chat)
    assert prompt.messages[0].role == ("document 1" if form == "roles" else "user")
    assert "It stands. It is old." in prompt.messages[0].content
    assert not prompt.messages[1].documents
    assert [message.content for message in prompt.appended] == ["Well, so?"]


async def test_a_contract_that_finds_nothing_to_rewrite_rewrote_nothing() -> None:
    chat = Chat(messages=(Message(role="user", content="x"),))
    fields = config(docs_as_message="json", sentence_boundaries={"documents": "c"})
    assert (await call(Answering([adapter(contract=fields)], "yes"), chat)).prefix_rewritten is None


async def test_arguments_of_its_own_for_the_template() -> None:
    fields = config(parameters={"extra_body": {"chat_template_kwargs": {"think": False}, "top_k": 2}})
    backend = Answering([adapter(contract=fields)], "yes")
    result = await call(backend)
    assert result.prefix_rewritten == "arguments of its own for the chat template"
    prompt = backend.requests[0].prompt
    assert isinstance(prompt, Chat)
    assert prompt.template_arguments == {"think": False}
    assert backend.requests[0].params.top_k == 2


async def test_the_final_channel_is_what_was_answered() -> None:
    pieces = ["<|channel|>", "analysis", "<|message|>", "hm", "<|end|>", "<|channel|>", "final", "<|message|>"]
    answer = tokens(*pieces, '"', "low", '"', "<|return|>", low=-0.4, high=-1.1)
    fields = config(response_format=LABELS, transformations=SCORE, logprobs_workaround=True)
    backend = Answering([adapter(contract=fields)], "analysis hm final", tokens=answer)
    assert 0.2 < (await call(backend)).result["score"] < 0.4


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"instruction": "x"}, "has an instruction, so it needs messages"),
        (
            {"docs_as_message": "json"},
            r"rewrites its prompt \(documents as messages at the start\), so it needs messages",
        ),
        ({"sentence_boundaries": {"documents": "c"}, "instruction": "x"}, "sentence tags in the documents"),
    ],
)
async def test_token_ids_cannot_be_rewritten_or_instructed(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ContractError, match=reason):
        await call(Answering([adapter(contract=config(**fields))], "x"), (1, 2))


async def test_arguments_without_an_instruction_are_refused() -> None:
    with pytest.raises(InputError, match="takes no arguments"):
        await call(Answering([adapter(contract=config(docs_as_message="json"))], "x"), CHAT, {"a": 1})


async def test_a_judged_turn_is_the_last_one() -> None:
    fields = config(sentence_boundaries={"last_message": "r"})
    backend = Answering([adapter(contract=fields, reads="user")], "x")
    await call(backend)
    prompt = backend.requests[0].prompt
    assert isinstance(prompt, Chat)
    assert [message.content for message in prompt.messages] == ["<r0> How old?"]
