"""Text cut into passages, at headings and then by length."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

Heading = tuple[int, str]  # its level and its title

_HEADING = re.compile(r" {0,3}(#{1,6})(?:[ \t]+(.*?))?(?:[ \t]+#+)?[ \t]*")
_FENCE = re.compile(r" {0,3}(`{3,}(?=[^`]*$)|~{3,})(.*)")

# From the widest to the narrowest: paragraph, line, sentence, word. Each leaves the white space with what is before it.
_BREAKS = (r"(?<=\n\n)", r"(?<=\n)", r"(?<=[.!?]\s)", r"(?<=\s)")


@dataclass(frozen=True, slots=True)
class Section:
    """What stands below one heading, up to the next. `path` are the headings above it, outermost first."""

    path: tuple[str, ...]
    text: str


def markdown_sections(text: str) -> list[Section]:
    """The sections of a Markdown text in their order; one of an empty path for what is before the first heading.

    Headings are lines that begin with `#`, outside code blocks. A heading with nothing below it makes no section.
    """
    found: list[tuple[tuple[Heading, ...], list[str]]] = [((), [])]
    for line, heading in _lines(text):
        if heading is None:
            found[-1][1].append(line)
        else:
            above = tuple(other for other in found[-1][0] if other[0] < heading[0])
            found.append(((*above, heading), []))
    bodies = (("\n".join(lines).strip("\n"), path) for path, lines in found)
    return [Section(tuple(title for _, title in path if title), body) for body, path in bodies if body.strip()]


def split_text(text: str, max_words: int) -> list[str]:
    """A text in parts of at most `max_words` words, cut at the widest break that allows it, without empty parts."""
    return [part.strip("\n") for part in _parts(re.sub(r"\n\s*\n", "\n\n", text), max_words, _BREAKS) if part.strip()]


def _lines(text: str) -> Iterator[tuple[str, Heading | None]]:
    """Each line, with its heading where it is one."""
    fence = ""
    for line in text.split("\n"):
        mark = _FENCE.fullmatch(line)
        if fence:
            # A code block ends with at least as many of the same characters, and nothing behind them.
            fence = "" if mark and mark[1].startswith(fence) and not mark[2].strip() else fence
        elif mark:
            fence = mark[1]
        elif heading := _HEADING.fullmatch(line):
            yield line, (len(heading[1]), (heading[2] or "").strip())
            continue
        yield line, None


def _parts(text: str, max_words: int, breaks: tuple[str, ...]) -> list[str]:
    if len(text.split()) <= max_words or not breaks:
        return [text]
    units = [unit for piece in re.split(breaks[0], text) for unit in _parts(piece, max_words, breaks[1:])]
    parts: list[str] = []
    count = 0
    for unit in units:
        # Units end in white space, so that their words add up.
        words = len(unit.split())
        if parts and count + words <= max_words:
            parts[-1] += unit
            count += words
        else:
            parts.append(unit)
            count = words
    return parts
