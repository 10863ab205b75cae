"""A label's expected value, by the logprobs of the token that it begins with."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from midstream.intrinsics.literals import Path, Position, literals
from midstream.types import TokenLogprob

Categories = Mapping[str | int | float | bool, float]

_PART = "�"  # what a token reads as that is only a part of a character


class LikelihoodReader:
    """Reads expectations off one answer: its text, and its tokens with the likeliest ones at the place of each."""

    def __init__(self, text: str, tokens: Sequence[TokenLogprob]) -> None:
        self._literals = literals(text)
        self._tokens = tokens
        self._starts = token_starts(text, tokens)

    def expectation(self, value: Any, path: Path, categories: Categories) -> float:
        """The expected value of the label that stands at `path` of the answer.

        The probability of a first token counts as that of the whole label. Raises ValueError where the label is no
        literal of the answer any more, or where no token begins with it.
        """
        literal = self._literals.get(path)
        if literal is None or literal.value != value:
            raise ValueError("it does not stand there in the answer itself, so it has no tokens")
        begin = literal.begin + isinstance(literal.value, str)  # behind the opening quote
        if begin not in self._starts:
            return self._certain(literal, begin, categories)
        return _expectation(literal.value, self._tokens[self._starts[begin]], categories)

    def _certain(self, literal: Position, begin: int, categories: Categories) -> float:
        """The value of a label that is the end of a longer token: none but that one was weighed."""
        earlier = max((start for start in self._starts if start < begin), default=None)
        token = "" if earlier is None else self._tokens[self._starts[earlier]].text
        if not token.endswith(json.dumps(literal.value)):
            raise ValueError(f"no token begins at character {begin}, where it begins")
        if literal.value not in categories:
            raise ValueError("it is none of the categories")
        return categories[literal.value]


def _expectation(value: Any, first: TokenLogprob, categories: Categories) -> float:
    """Sum of share times value. Other programs must find the same bits, so the order of the operations is fixed."""
    weighed: list[tuple[float, float]] = []
    if value in categories:
        weighed.append((math.exp(first.logprob), categories[value]))
    for other in first.top:
        if other.text == first.text:
            continue  # counted already
        # A truth value is compared as Python writes it, so `true` begins no category: only the chosen one counts.
        named = next((v for category, v in categories.items() if str(category).startswith(other.text)), None)
        if named is not None:
            weighed.append((math.exp(other.logprob), named))
    if not weighed:
        return 0.0
    total = sum(weight for weight, _ in weighed)
    if total == 0.0:
        raise ValueError("the probabilities of all categories are zero")
    return sum(weight / total * v for weight, v in weighed)


def token_starts(text: str, tokens: Sequence[TokenLogprob]) -> dict[int, int]:
    """Token indices by the character that each begins at; of several at one place the last.

    Some tokens are a part of a character: the next whole one tells where that character ends. Tokens after the text's
    end, as one that ends the answer, are left out. Raises ValueError when the tokens are not those of the text.
    """
    starts: dict[int, int] = {}
    at = 0
    within = False  # behind some part of a character
    for index, token in enumerate(tokens):
        if at >= len(text):
            break
        piece = token.text
        broken = _PART in piece and not _stands(text, piece, at)
        head = piece.partition(_PART)[0] if broken else piece
        if within and not head:
            continue
        if within:
            at = text.find(head, at)
        if at < 0 or not _stands(text, head, at):
            raise ValueError(
                f"the tokens of the logprobs are not those of the text (from token {index}, {piece!r}, on)"
            )
        starts[at] = index
        at += len(head)
        within = broken
    return starts


def _stands(text: str, piece: str, at: int) -> bool:
    """Whether a piece is what the text has at a place, as far as the text goes."""
    there = text[at : at + len(piece)]
    return piece.startswith(there) if at + len(piece) > len(text) else piece == there
