"""What a contract does to a request: sentence tags, then documents as messages, then the instruction, then parameters.

Once for our own chats, and once for the bodies of chat completions that other programs send.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Literal

from pydantic import ValidationError

from midstream.errors import InputError
from midstream.intrinsics.sentences import Passage, Tagged, tag
from midstream.intrinsics.spec import Contract, Source
from midstream.intrinsics.wire import ChatBody, ExtraBody, ordered, read
from midstream.types import Chat, Document, Message

TOP_LOGPROBS = 10  # how many alternatives a likelihood weighs

Form = Literal["string", "json", "roles"]


# ---------------------------------------------------------------------- our own chats


def rewrite_chat(chat: Chat, contract: Contract) -> tuple[Chat, Tagged]:
    """A chat with its last message and all its documents as the contract wants them, and what of it may have tags.

    The documents are those of the turns in their order, then the chat's own. The instruction is not added here.
    """
    chat = _tag_chat(chat, contract.sentence_boundaries or {})
    documents = _documents_of(chat)
    passages = tuple(Passage(document.text, document.doc_id or None) for document in documents)
    tagged = Tagged(chat.messages[-1].content, passages)
    if contract.docs_as_message and documents:
        moved = documents_as_messages([_wire(document) for document in documents], contract.docs_as_message)
        chat = _with_documents(chat, ())
        chat = chat.model_copy(update={"messages": (*moved, *chat.messages)})
    if contract.template_arguments:
        arguments = {**chat.template_arguments, **contract.template_arguments}
        chat = chat.model_copy(update={"template_arguments": arguments})
    return chat, tagged


def _tag_chat(chat: Chat, tags: Mapping[Source, str]) -> Chat:
    if "last_message" in tags:
        last = chat.messages[-1]
        (content,) = tag([last.content], tags["last_message"])
        last = last.model_copy(update={"content": content})
        chat = chat.model_copy(update={"messages": (*chat.messages[:-1], last)})
    if "documents" in tags:
        documents = _documents_of(chat)
        texts = tag([document.text for document in documents], tags["documents"])
        renewed = [old.model_copy(update={"text": text}) for old, text in zip(documents, texts, strict=True)]
        chat = _with_documents(chat, renewed)
    return chat


def _documents_of(chat: Chat) -> list[Document]:
    return [*(document for message in chat.messages for document in message.documents), *chat.documents]


def _with_documents(chat: Chat, documents: Sequence[Document]) -> Chat:
    """With other documents, as many as there are and in the same places; or with none."""
    rest = iter(documents)

    def renewed(old: Sequence[Document]) -> tuple[Document, ...]:
        return tuple(islice(rest, len(old)))

    messages = tuple(m.model_copy(update={"documents": renewed(m.documents)}) for m in chat.messages)
    return chat.model_copy(update={"messages": messages, "documents": renewed(chat.documents)})


def _wire(document: Document) -> dict[str, str]:
    """A document as a request has it: what it does not have is left out."""
    fields = {"text": document.text, "title": document.title, "doc_id": document.doc_id}
    return {name: value for name, value in fields.items() if value or name == "text"}


# ---------------------------------------------------------------------- for both


def documents_as_messages(documents: Sequence[Mapping[str, Any]], form: Form) -> tuple[Message, ...]:
    """Documents ({text, [title], [doc_id]}) as messages for the start of a chat: one for all, or one for each."""
    if form == "roles":
        return tuple(_document_message(document) for document in documents)
    if form == "json":
        return (Message(role="user", content=json.dumps(list(documents))),)
    passages = [f"[Document {document.get('doc_id')}]\n{document['text']}" for document in documents]
    return (Message(role="user", content="You have access to the following documents:\n\n" + "\n\n".join(passages)),)


def _document_message(document: Mapping[str, Any]) -> Message:
    role = f"document {document.get('doc_id')}"
    try:
        return Message(role=role, content=document["text"])
    except ValidationError as error:
        raise InputError(f"a document's doc_id cannot stand in the role {role!r}") from error


def instruct(chat: Chat, contract: Contract, arguments: Mapping[str, Any], name: str) -> Chat:
    """A chat with the contract's instruction as its last turn. Raises InputError unless the arguments are its own."""
    check_arguments(contract, arguments, name)
    if contract.instruction is None:
        return chat
    try:
        return chat.instructed(contract.instruction, arguments)
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        raise InputError(f"intrinsic {name}: its instruction needs argument {error}") from error


def check_arguments(contract: Contract, arguments: Mapping[str, Any], name: str) -> None:
    """Raise InputError when an argument is given that the instruction has no place for."""
    if not arguments or arguments.keys() <= contract.arguments:
        return
    if contract.instruction is None:
        raise InputError(f"intrinsic {name} takes no arguments, {sorted(arguments)} were given")
    unknown = ", ".join(sorted(arguments.keys() - contract.arguments))
    wanted = ", ".join(sorted(contract.arguments)) or "none"
    raise InputError(f"intrinsic {name} does not take {unknown}; its arguments: {wanted}")


# ---------------------------------------------------------------------- bodies of other programs


def rewrite_body(
    contract: Contract,
    body: Mapping[str, Any],
    arguments: Mapping[str, Any] | None = None,
    *,
    model_name: str | None = None,
) -> dict[str, Any]:
    """The chat completion request that calls an intrinsic, from one that is only the conversation.

    `body`: messages, model, extra_body {documents, ...} and any other fields; it stays as it is. `model_name` names the
    adapter, else the contract does. Raises InputError where the body or the arguments are wrong.
    """
    name = model_name or contract.name or "of this contract"
    request = read(ChatBody, body, "request").model_dump(exclude_unset=True)
    _tag_body(request, contract)
    if contract.docs_as_message:
        _move_documents(request, contract.docs_as_message)
    check_arguments(contract, arguments or {}, name)
    if contract.instruction is not None:
        last = Chat(messages=(Message(role="user", content=request["messages"][-1]["content"]),))
        request["messages"] += map(_as_body, instruct(last, contract, arguments or {}, name).appended)
    return _with_parameters(request, contract, model_name)


def _tag_body(request: dict[str, Any], contract: Contract) -> None:
    for source, prefix in (contract.sentence_boundaries or {}).items():
        places = _documents(request) or [] if source == "documents" else request["messages"][-1:]
        key = "text" if source == "documents" else "content"
        for place, text in zip(places, tag([place[key] for place in places], prefix), strict=True):
            place[key] = text


def _documents(request: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    return (request.get("extra_body") or {}).get("documents")


def _move_documents(request: dict[str, Any], form: Form) -> None:
    documents = _documents(request)
    if documents is not None:
        request["messages"][:0] = map(_as_body, documents_as_messages(documents, form))
        del request["extra_body"]["documents"]


def _as_body(message: Message) -> dict[str, Any]:
    return {"content": message.content, "role": message.role}


def _with_parameters(request: dict[str, Any], contract: Contract, model_name: str | None) -> dict[str, Any]:
    parameters = copy.deepcopy(contract.parameters or {})
    extra = {**(request.get("extra_body") or {}), **parameters.pop("extra_body", {})}
    if model_name is not None or contract.model:
        parameters["model"] = contract.model if model_name is None else model_name
    if contract.needs_logprobs:
        parameters |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
    if contract.response_format is not None:
        extra["structured_outputs"] = {"json": contract.json_schema}
    if extra:
        parameters["extra_body"] = ordered(ExtraBody, extra)
    return ordered(ChatBody, {**request, **parameters})


def tagged_of(contract: Contract, request: Mapping[str, Any]) -> Tagged:
    """What of a rewritten body may have tags. Raises InputError where it is not one that the contract rewrote."""
    body = read(ChatBody, request, "request").model_dump()
    messages = body["messages"]
    last = len(messages) - (1 if contract.instruction is None else 2)
    if last < 0:
        raise InputError("request: it has no message before the instruction")
    return Tagged(messages[last]["content"], tuple(_passages(contract.docs_as_message, body)))


def _passages(form: Form | None, body: Mapping[str, Any]) -> Iterator[Passage]:
    if form == "roles":
        for message in body["messages"]:
            kind, _, document_id = message["role"].partition(" ")
            if kind == "document":
                yield Passage(message["content"], document_id)
        return
    documents = _documents(body) if form is None else _documents_in(body["messages"][0]["content"])
    for document in documents or []:
        yield Passage(document["text"], document.get("doc_id"))


def _documents_in(content: str) -> list[dict[str, Any]]:
    """The documents of a first message that `documents_as_messages` wrote as JSON."""
    try:
        extra = read(ExtraBody, {"documents": json.loads(content)}, "request")
    except ValueError as error:
        raise InputError(f"request: its first message is not the documents as JSON: {error}") from error
    return extra.model_dump()["documents"] or []
