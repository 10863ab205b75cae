"""Documents rendered into the turns that retrieved them, for templates that have no place for them."""

from __future__ import annotations

from typing import Any

from midstream.errors import InputError
from midstream.types import Chat, Document, Message


def place_documents(chat: Chat) -> tuple[dict[str, Any], ...]:
    """Messages with each turn's documents rendered into that very turn, so that later turns leave it as it is.

    The chat's own documents belong to its last user turn. This one function serves training, evaluation and serving.
    """
    turns = (*settled(chat), *chat.appended)
    return tuple({**m.extra, "role": m.role, "content": _content(m)} for m in turns)


def settled(chat: Chat) -> tuple[Message, ...]:
    """The messages, the chat's own documents in its last user turn. Raises InputError where there is none for them."""
    if not chat.documents:
        return chat.messages
    last = max((i for i, message in enumerate(chat.messages) if message.role == "user"), default=None)
    if last is None:
        raise InputError("documents need a user message to stand in")
    turn = chat.messages[last]
    filled = turn.model_copy(update={"documents": (*turn.documents, *chat.documents)})
    return (*chat.messages[:last], filled, *chat.messages[last + 1 :])


def _content(message: Message) -> str:
    parts = [_passage(i, document) for i, document in enumerate(message.documents, 1)]
    return "\n\n".join([*parts, message.content])


def _passage(number: int, document: Document) -> str:
    title = f" {document.title}" if document.title else ""
    return f"Document [{number}]:{title}\n{document.text}"
