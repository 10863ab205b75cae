"""The invocation: a text whose tokens switch an adapter on. Proposed from the data, and checked in every example."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from midstream.errors import InvocationError
from midstream.models.chat import ChatTokenizer
from midstream.types import Chat, Message

# Enough of the text before an invocation for any merge across the border to show.
_BORDER = 8


def propose(name: str, chat: ChatTokenizer, prefixes: Iterable[Sequence[int]], answers: Iterable[str]) -> str:
    """The shortest text made of `name` that occurs in no prefix and keeps its tokens between prefix and answer.

    Candidates are the model's own turn header with the name as its role, and tags of ordinary tokens. Raises
    InvocationError when none will do.
    """
    prefixes, answers = list(prefixes), sorted(set(answers))
    word = re.sub(r"\W+", "_", name).strip("_") or "adapter"
    refused: list[str] = []
    for text in sorted(_candidates(word, chat), key=lambda text: len(chat.encode(text))):
        try:
            for prefix in prefixes:
                check(text, chat, prefix)
            for answer in answers:
                check_answer(text, chat, answer)
        except InvocationError as error:
            refused.append(str(error))
            continue
        return text
    raise InvocationError(f"no invocation found for {name}: {'; '.join(refused)}. Choose one yourself")


def check(text: str, chat: ChatTokenizer, prefix: Sequence[int]) -> None:
    """Raises InvocationError where the text's tokens change after this prefix, or the prefix contains them."""
    invocation = chat.encode(text)
    before = chat.decode(prefix[-_BORDER:])
    if chat.encode(before + text)[-len(invocation) :] != invocation:
        raise InvocationError(f"{text!r} has other tokens after {before!r}")
    if _contains(prefix, invocation):
        raise InvocationError(f"the conversation already contains {text!r}")


def check_answer(text: str, chat: ChatTokenizer, answer: str) -> None:
    """Raises InvocationError where the text's tokens change before this answer."""
    invocation = chat.encode(text)
    if chat.encode(text + answer)[: len(invocation)] != invocation:
        raise InvocationError(f"{text!r} has other tokens before {answer[:20]!r}")


def _candidates(word: str, chat: ChatTokenizer) -> list[str]:
    tags = [f"<{word}>", f"[{word}]"]
    header = _header(chat)
    return [header.replace("assistant", word), *tags] if "assistant" in header else tags


def _header(chat: ChatTokenizer) -> str:
    try:
        return chat.decode(chat.reply_header(Chat(messages=(Message(role="user", content="x"),))))
    except Exception:
        return ""  # a model without a chat template, or with one that refuses: the plain tags remain


def _contains(tokens: Sequence[int], part: Sequence[int]) -> bool:
    width = len(part)
    return any(tuple(tokens[i : i + width]) == tuple(part) for i in range(len(tokens) - width + 1))
