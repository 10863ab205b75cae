"""What answers are compared by when they vote."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

import regex

from midstream.errors import InputError

Key = Callable[[str], str | None]
"""The key of an answer's text; None where it has none, and so no vote."""

_PATIENCE_S = 0.25  # an expression that backtracks without end keeps everybody else's requests waiting
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


def normalised(text: str) -> str:
    """Without case, articles, punctuation and superfluous white space.

    Signs that are part of a number stay (-5, 3.5, 1/2), but for those between thousands. What would be nothing then
    keeps its articles, as the option "A" of a multiple choice, or its punctuation.
    """
    folded = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    joined = _THOUSANDS.sub("", folded)
    words = "".join(sign for at, sign in enumerate(joined) if not _is_punctuation(joined, at))
    return _squeezed(_ARTICLES.sub(" ", words)) or _squeezed(words) or folded


def compiled(pattern: str) -> regex.Pattern[str]:
    """A regular expression with a group. Raises ValueError where it is none."""
    try:
        found = regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError) as error:
        raise ValueError(f"it is no regular expression: {error}") from error
    if not found.groups:
        raise ValueError("it needs a group: put what is to be compared into parentheses")
    return found


def extracting(pattern: str) -> Key:
    """The key that is the normalised first group of a pattern's last match.

    A search that takes too long is a TimeoutError, and so are all later ones at once.
    """
    expression = compiled(pattern)
    late = False

    def key(text: str) -> str | None:
        nonlocal late
        if late:
            raise TimeoutError("an earlier search took too long")
        found = None
        try:
            for match in expression.finditer(text, timeout=_PATIENCE_S):
                found = match.group(1)
        except TimeoutError:
            late = True
            raise TimeoutError(f"the search for {pattern!r} took longer than {_PATIENCE_S} s") from None
        return None if found is None else normalised(found)

    return key


def key_of(key: Key, text: str) -> str | None:
    """An answer's key. Raises InputError where the caller's own function fails or gives no text."""
    try:
        found = key(text)
    except Exception as error:
        raise InputError(f"the key of an answer failed: {type(error).__name__}: {error}") from error
    if found is not None and not isinstance(found, str):
        raise InputError(f"the key of an answer is {found!r}: it must be a text, or None for no vote")
    return found


def _is_punctuation(text: str, at: int) -> bool:
    sign = text[at]
    if sign != "`" and not unicodedata.category(sign).startswith("P"):
        return False
    before, after = text[at - 1 : at] if at else "", text[at + 1 : at + 2]
    if not after.isdigit():
        return True
    return not (before.isdigit() if sign in ".,:/" else sign == "-" and not before.isalnum())


def _squeezed(text: str) -> str:
    return " ".join(text.split())
