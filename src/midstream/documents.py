"""Documents rendered into the turns that retrieved them, for templates that have no place for them."""

from __future__ import annotations

from typing import Any

from midstream.errors import InputError
from midstream.types import Chat, Document, Message


def place_documents(chat: Chat) -> tuple[dict[str, Any], ...]:
    """Messages with each turn's documents rendered into that very turn, so that later turns leave it as it is.

    The chat's own documents belong to its last user turn. This one function serves training, evaluation and serving.
    """
    last_user = max((i for i, m in enumerate(chat.messages) if m.role == "user"), default=None)
    if chat.documents and last_user is None:
        raise InputError("documents need a user message to stand in")
    return tuple(
        {**m.extra, "role": m.role, "content": _content(m, chat.documents if i == last_user else ())}
        for i, m in enumerate((*chat.messages, *chat.appended))
    )


def _content(message: Message, documents: tuple[Document, ...]) -> str:
    parts = [_passage(i, document) for i, document in enumerate((*message.documents, *documents), 1)]
    return "\n\n".join([*parts, message.content])


def _passage(number: int, document: Document) -> str:
    title = f" {document.title}" if document.title else ""
    return f"Document [{number}]:{title}\n{document.text}"
