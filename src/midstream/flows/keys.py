"""What answers are compared by when they vote."""

from __future__ import annotations

import re
import time
import unicodedata
from collections.abc import Callable

import re2

from midstream.errors import InputError

Key = Callable[[str], str | None]
"""The key of an answer's text; None where it has none, and so no vote."""

_MOST_BYTES = 2**20  # of an expression, its automata included: it may come from anybody
_PATIENCE_S = 0.25  # a search is linear, but there can be as many as the text has signs, and others wait meanwhile
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


def compiled(pattern: str) -> re2._Regexp:
    """A regular expression with a group, in RE2's syntax. Raises ValueError where it is none, or too large."""
    options = re2.Options()
    options.max_mem = _MOST_BYTES
    options.log_errors = False
    try:
        found = re2.compile(pattern, options)
    except (re2.error, UnicodeEncodeError) as error:
        syntax = "RE2's syntax, which has no look-around and no back-references"
        raise ValueError(f"it is no regular expression in {syntax}: {_why(error)}") from error
    if not found.groups:
        raise ValueError("it needs a group: put what is to be compared into parentheses")
    return found


def extracting(pattern: str) -> Key:
    """The key that is the normalised first group of a pattern's last match. Raises ValueError as `compiled` does.

    Where the matches of a text take too long, it is a TimeoutError, and so are all later ones at once.
    """
    expression = compiled(pattern)
    late = False

    def key(text: str) -> str | None:
        nonlocal late
        found = None
        began = time.thread_time()
        for match in expression.finditer(text):
            late = late or time.thread_time() - began > _PATIENCE_S
            if late:
                raise TimeoutError(f"the matches of {pattern!r} took longer than {_PATIENCE_S} s")
            found = match.group(1)
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


def _why(error: Exception) -> str:
    said = error.args[0]
    return said.decode(errors="replace") if isinstance(said, bytes) else str(error)
