"""Conversations of an exact length, made of real text."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from midstream.models.chat import ChatTokenizer

SHORTEST = 32
"""Tokens: room for the markers of a turn and some text in it."""

Tokens = tuple[int, ...]


def conversation(chat: ChatTokenizer, tokens: int) -> Tokens:
    """A conversation of exactly that many tokens (SHORTEST at least), which ends with a closed turn."""
    content = json.loads((files("midstream") / "data" / "demo_chat.json").read_text(encoding="utf-8"))
    passages = "\n\n".join(d["text"] for turn in content["turns"] for d in turn["documents"])
    head, tail = chat.encode("<|im_start|>user\n"), chat.encode("<|im_end|>\n")
    body = chat.encode(passages)
    room = tokens - len(head) - len(tail)
    repeated = body * (room // len(body) + 1)
    return (*head, *repeated[:room], *tail)


def parting_early(chat: ChatTokenizer, tokens: int, number: int) -> Tokens:
    """One of ten conversations that share next to nothing."""
    return _marked(chat, conversation(chat, tokens), 3, number)


def parting_late(chat: ChatTokenizer, tokens: int, number: int) -> Tokens:
    """One of ten conversations that share all but their last SHORTEST / 2 tokens."""
    return _marked(chat, conversation(chat, tokens), tokens - SHORTEST // 2, number)


def _marked(chat: ChatTokenizer, tokens: Tokens, place: int, digit: int) -> Tokens:
    return (*tokens[:place], chat.encode(str(digit))[-1], *tokens[place + 1 :])
