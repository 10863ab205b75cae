"""Requests rewritten as granite-common 0.4.1 rewrites them, and where it does not."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from midstream.errors import InputError
from midstream.intrinsics import Contract, rewrite_body
from midstream.intrinsics.rewrite import rewrite_chat
from midstream.types import Chat, Document, Message
from tests.intrinsics.reference import Config, config, rewritten

TALK = [
    {"role": "system", "content": "Be brief. Be kind."},
    {"role": "user", "content": "Who built it? When was that? Dr. Watson asks."},
    {"role": "assistant", "content": "It was built in 1752.  Its lamp is from 1998!\n\nIs that all? Yes: e.g. this."},
]
DOCUMENTS = [
    {"doc_id": "1", "text": "The light is old. It was built in 1752. Prof. Hale wrote so."},
    {"text": "One sentence", "title": "Second", "doc_id": "b"},
    {"doc_id": "c 3", "title": None, "text": "Ende. „Gut.“ Ünd?\n\nNeu. 日本語です。"},
]
BODIES: dict[str, dict[str, Any]] = {
    "one turn": {"messages": TALK[1:2], "extra_body": {}},
    "no documents": {"model": "m", "messages": TALK, "extra_body": {"documents": None}, "temperature": 0.3},
    "empty list": {"messages": TALK[:2], "extra_body": {"documents": []}, "stream": False},
    "one document": {"messages": TALK, "extra_body": {"documents": DOCUMENTS[:1]}, "max_tokens": 7, "user": "u"},
    "three": {"extra_body": {"top_k": 3, "documents": DOCUMENTS}, "seed": 1, "messages": TALK[:2], "model": "m"},
    "template arguments": {
        "messages": [*TALK, {"content": "And then? Go on.", "role": "user", "name": "left out"}],
        "extra_body": {"documents": DOCUMENTS[1:], "chat_template_kwargs": {"z": 1, "a": None}, "min_p": 0.1},
        "tools": [{"parameters": {"type": "object"}, "name": "f", "description": "d"}],
    },
    "calls": {
        "messages": [
            {"role": "developer", "content": "Rules. More rules."},
            {"role": "user", "content": "x"},
            {"tool_calls": [{"arguments": {"b": 1, "a": 2}, "name": "f"}], "content": "", "role": "assistant"},
            {"role": "tool", "tool_call_id": "t1", "content": "Sunny. 20 degrees. Mr. Sun says so."},
        ],
        "extra_body": {"documents": DOCUMENTS[:2], "add_generation_prompt": False},
    },
    "empty message": {"messages": [{"role": "user", "content": ""}], "extra_body": {"documents": DOCUMENTS[:1]}},
}
WITH_DOCUMENTS = ["one document", "three", "template arguments", "calls", "empty message"]
TAGS = {
    "last": {"last_message": "c"},
    "documents": {"documents": "d"},
    "both": {"last_message": "r", "documents": "c"},
    "other order": {"documents": "x", "last_message": "y"},
}
FORMS = ("string", "json", "roles")
INSTRUCTIONS = {
    "plain": ("Judge the {{last}} answer.", {}),
    "last message": ("Judge <{last_message}>!", {}),
    "arguments": ("Is it {tone}? {last_message} {{x}} {n:03d}", {"tone": "kind", "n": 7}),
}


def same(fields: Config, body: Any, arguments: Any = None, **options: Any) -> Any:
    """Rewritten alike by both, and not what it was."""
    found = rewritten(fields, body, arguments, **options)
    assert json.dumps(found) != json.dumps(rewrite_body(Contract(), body))
    return found


@pytest.mark.parametrize(("body", "tags"), [*itertools.product(BODIES, ["last", "both", "other order"])])
def test_sentence_tags_in_the_last_message(body: str, tags: str) -> None:
    if body == "empty message" and tags == "last":
        return  # nothing to tag
    found = same(config(sentence_boundaries=TAGS[tags]), BODIES[body])
    if body != "empty message":
        assert found["messages"][-1]["content"].startswith(f"<{TAGS[tags]['last_message']}0> ")


@pytest.mark.parametrize(("body", "tags"), [*itertools.product(WITH_DOCUMENTS, ["documents", "both", "other order"])])
@pytest.mark.parametrize("instruction", [None, "Which? {last_message}"])
def test_sentence_tags_in_documents(body: str, tags: str, instruction: str | None) -> None:
    found = same(config(sentence_boundaries=TAGS[tags], instruction=instruction), BODIES[body])
    texts = [document["text"] for document in found["extra_body"]["documents"]]
    assert all(text.startswith(f"<{TAGS[tags]['documents']}") for text in texts)


@pytest.mark.parametrize(("body", "tags"), [*itertools.product(["empty list", *WITH_DOCUMENTS], [None, *TAGS])])
@pytest.mark.parametrize("form", FORMS)
def test_documents_as_messages(form: str, body: str, tags: str | None) -> None:
    if form == "roles" and body == "empty list":
        assert "documents" not in rewritten(config(docs_as_message=form), BODIES[body])["extra_body"]
        return
    fields = config(
        docs_as_message=form, sentence_boundaries=TAGS[tags] if tags else None, instruction="{last_message}"
    )
    found = same(fields, BODIES[body])
    assert "documents" not in found["extra_body"]
    assert found["messages"][0]["role"] == ("document 1" if form == "roles" else "user") or body == "template arguments"


@pytest.mark.parametrize(("body", "kind"), [*itertools.product(BODIES, INSTRUCTIONS)])
def test_instructions(body: str, kind: str) -> None:
    instruction, arguments = INSTRUCTIONS[kind]
    found = same(config(instruction=instruction), BODIES[body], arguments)
    last = BODIES[body]["messages"][-1]["content"]
    assert found["messages"][-1]["role"] == "user"
    assert kind == "plain" or last in found["messages"][-1]["content"]


@pytest.mark.parametrize(
    "parameters",
    [
        {"max_tokens": 3, "temperature": 0},
        {"model": "parameter", "logprobs": False},
        {"extra_body": {"add_generation_prompt": False, "k": [1, {"b": 2}]}},
        {"stop": ["a"], "extra_body": {"structured_outputs": {"regex": "a*"}, "chat_template_kwargs": {"q": True}}},
        {"temperature": 0.7, "top_p": 0.2, "seed": 3, "extra_body": {}},
    ],
)
@pytest.mark.parametrize("body", BODIES)
def test_parameters_go_over_those_of_the_body(body: str, parameters: dict[str, Any]) -> None:
    likelihood = {"type": "likelihood", "input_path": [], "categories_to_values": {"a": 1}}
    same(config(parameters=parameters), BODIES[body])
    same(config(parameters=parameters, model=None, response_format='{"type": "string", "a": 1}'), BODIES[body])
    found = same(
        config(parameters=parameters, response_format={"enum": ["ä"]}, transformations=[likelihood]), BODIES[body]
    )
    assert found["logprobs"] is True
    assert found["top_logprobs"] == 10
    assert found["extra_body"]["structured_outputs"] == {"json": {"enum": ["ä"]}}


@pytest.mark.parametrize(("body", "named"), [*itertools.product(BODIES, [None, "adapter", ""])])
@pytest.mark.parametrize("model", [None, "", "granite"])
def test_the_name_of_the_model(body: str, named: str | None, model: str | None) -> None:
    found = rewritten(config(model=model), BODIES[body], model_name=named)
    assert found.get("model") == (named if named is not None else model or BODIES[body].get("model"))


def test_a_body_without_extra_body() -> None:
    body = {"messages": TALK}
    assert "extra_body" not in rewritten(config(instruction="x"), body)
    assert rewritten(config(response_format='{"type": "string"}'), {**body, "extra_body": None})["extra_body"]
    assert rewritten(config(docs_as_message="json", parameters={"n": 1}), body)["n"] == 1


# ---------------------------------------------------------------------- otherwise than the reference


def test_tags_need_no_extra_body() -> None:
    """The reference raises AttributeError where a request with sentence tags has no extra_body."""
    contract = Contract(sentence_boundaries={"last_message": "c", "documents": "d"})
    found = rewrite_body(contract, {"messages": [{"role": "user", "content": "It stands. It shines."}]})
    assert found == {"messages": [{"content": "<c0> It stands. <c1> It shines.", "role": "user"}]}


def test_calls_of_tools_in_openai_s_form_stay_as_they_are() -> None:
    """The reference knows only its own form of tools and refuses the other."""
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    tool = {"type": "function", "function": {"name": "f"}}
    body = {"messages": [{"role": "assistant", "content": "", "tool_calls": [call]}], "tools": [tool]}
    found = rewrite_body(Contract(instruction="x"), body)
    assert found["messages"][0]["tool_calls"] == [call]
    assert found["tools"] == [tool]


@pytest.mark.parametrize(
    ("contract", "body", "arguments", "reason"),
    [
        (Contract(instruction="{a}"), {"messages": TALK}, {}, "needs argument 'a'"),
        (Contract(instruction="{a}"), {"messages": TALK}, {"a": 1, "b": 2}, "does not take b; its arguments: a"),
        (Contract(), {"messages": TALK}, {"b": 2}, "takes no arguments"),
        (Contract(instruction="{a.b}"), {"messages": TALK}, {"a": "x"}, "needs argument"),
        (Contract(), {"messages": []}, {}, "messages: List should have at least 1 item"),
        (Contract(), {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, {}, "messages.0.content"),
        (Contract(), {"messages": [{"role": "nobody", "content": "x"}]}, {}, "messages.0.role"),
        (Contract(), {"messages": TALK, "extra_body": {"documents": [{"doc_id": 3}]}}, {}, "documents.0.text"),
        (
            Contract(docs_as_message="roles"),
            {"messages": TALK, "extra_body": {"documents": [{"text": "a", "doc_id": ""}]}},
            {},
            "cannot stand in the role 'document '",
        ),
    ],
)
def test_what_is_wrong_is_named(contract: Contract, body: Any, arguments: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        rewrite_body(contract, body, arguments)


# ---------------------------------------------------------------------- our own chats


def test_documents_of_turns_are_tagged_where_they_stand() -> None:
    chat = Chat(
        messages=(
            Message(role="user", content="First? Really?", documents=(Document(text="It stands. It shines."),)),
            Message(role="assistant", content="Yes. So it is."),
        ),
        documents=(Document(text="It fell.", doc_id="2"), Document(text="")),
    )
    found, tagged = rewrite_chat(chat, Contract(sentence_boundaries={"documents": "d", "last_message": "m"}))
    assert found.messages[0].content == "First? Really?"
    assert found.messages[0].documents[0].text == "<d0> It stands. <d1> It shines."
    assert found.messages[1].content == tagged.last_message == "<m0> Yes. <m1> So it is."
    assert [document.text for document in found.documents] == ["<d2> It fell.", ""]
    assert [(p.text, p.document_id) for p in tagged.documents][1] == ("<d2> It fell.", "2")
    assert tagged.documents[0].document_id is None


@pytest.mark.parametrize("form", FORMS)
def test_a_chat_s_documents_become_the_messages_that_a_body_s_become(form: Any) -> None:
    documents = [{"text": "It stands. It shines.", "title": "T", "doc_id": "1"}, {"text": "It fell.", "doc_id": "2"}]
    contract = Contract(docs_as_message=form, sentence_boundaries={"documents": "c"})
    chat = Chat(
        messages=(
            Message(role="user", content="x", documents=(Document.model_validate(documents[0]),)),
            Message(role="assistant", content="y"),
        ),
        documents=(Document.model_validate(documents[1]),),
    )
    messages = [{"role": message.role, "content": message.content} for message in chat.messages]
    body = rewrite_body(contract, {"messages": messages, "extra_body": {"documents": documents}})
    found, _ = rewrite_chat(chat, contract)
    assert [{"content": m.content, "role": m.role} for m in found.messages] == body["messages"]
    assert not found.documents
    assert not any(message.documents for message in found.messages)
