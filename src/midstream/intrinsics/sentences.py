"""Sentences with tags: `<c0> One. <c1> Two.`, and where each stands in the text without them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any


@dataclass(frozen=True, slots=True)
class Sentence:
    """A tagged sentence, with the space before the next tag. `begin` and `end` count characters without tags."""

    begin: int
    end: int
    text: str
    document_id: str | None = None


@dataclass(frozen=True, slots=True)
class Passage:
    """A document as the model saw it."""

    text: str
    document_id: str | None = None


@dataclass(frozen=True, slots=True)
class Tagged:
    """What of a rewritten request may have tags: its last message (without an instruction) and its documents."""

    last_message: str
    documents: tuple[Passage, ...] = ()


def split(text: str) -> list[str]:
    """The sentences of a text, without the white space around them."""
    return list(_tokenizer().tokenize(text))


def tag(texts: Sequence[str], prefix: str) -> list[str]:
    """Texts with each sentence tagged by a number that runs through all of them, and one space between sentences."""
    tagged: list[str] = []
    number = 0
    for text in texts:
        sentences = [f"{_tag(prefix, i)}{sentence}" for i, sentence in enumerate(split(text), number)]
        number += len(sentences)
        tagged.append(" ".join(sentences))
    return tagged


def untag(text: str, prefix: str, first: int = 0, document_id: str | None = None) -> list[Sentence]:
    """The sentences of a text that `tag` made; `first` is the number of its first one.

    Raises ValueError when that tag is not there. An empty text has no sentences.
    """
    if not text:
        return []
    opening = _tag(prefix, first)
    at = text.find(opening)
    if at < 0:
        raise ValueError(f"no sentence tag {opening!r} in {text!r}")
    found: list[Sentence] = []
    begin, start = 0, at + len(opening)
    while True:
        opening = _tag(prefix, first + len(found) + 1)
        at = text.find(opening, start)
        body = text[start:] if at < 0 else text[start:at]
        found.append(Sentence(begin, begin + len(body), body, document_id))
        if at < 0:
            return found
        begin, start = begin + len(body), at + len(opening)


def untag_passages(passages: Sequence[Passage], prefix: str) -> list[Sentence]:
    """The sentences of all documents, in the order of their numbers."""
    found: list[Sentence] = []
    for passage in passages:
        found += untag(passage.text, prefix, len(found), passage.document_id)
    return found


def _tag(prefix: str, number: int) -> str:
    return f"<{prefix}{number}> "


@cache
def _tokenizer() -> Any:
    # Importing nltk takes seconds, and most contracts tag nothing.
    from nltk.tokenize.punkt import PunktSentenceTokenizer

    return PunktSentenceTokenizer()
