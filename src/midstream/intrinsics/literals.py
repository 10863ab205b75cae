"""Where the literals of a JSON text stand in it, and paths into JSON values."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Path = tuple[str | int, ...]

_TOKEN = re.compile(
    r'"[^"\\]*(?:\\.[^"\\]*)*"|-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?|true|false|null|NaN|-?Infinity|[\[\]{},]',
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Position:
    """A string, number, truth value or null, and the characters that it covers (a string's quotes among them)."""

    value: Any
    begin: int
    end: int


def literals(text: str) -> dict[Path, Position]:
    """The literals of a valid JSON text by their paths. Of a key that comes twice the last one counts."""
    found: dict[Path, Position] = {}
    path: list[str | int] = []  # in each open object a key, in each open list an index
    wants_key = False
    for match in _TOKEN.finditer(text):
        token = match.group()
        if token in "[{":
            path.append(0 if token == "[" else "")
            wants_key = token == "{"
        elif token in "]}":
            path.pop()
        elif token == ",":
            wants_key = isinstance(path[-1], str)
            if isinstance(path[-1], int):
                path[-1] += 1
        elif wants_key:
            path[-1] = json.loads(token)
            wants_key = False
        else:
            found[tuple(path)] = Position(json.loads(token), *match.span())
    return found


def matching(value: Any, expression: Sequence[str | int | None]) -> list[Path]:
    """The paths in a JSON value that fit an expression, in the order of the text. None in it fits any key or index."""
    paths: list[Path] = [()]
    for element in expression:
        paths = [(*path, key) for path in paths for key in _keys(fetch(value, path)) if _fits(key, element)]
    return paths


def _keys(value: Any) -> Sequence[str | int]:
    if isinstance(value, dict):
        return list(value)
    return range(len(value)) if isinstance(value, list) else ()


def _fits(key: str | int, element: str | int | None) -> bool:
    return element is None or key == element


def fetch(value: Any, path: Path) -> Any:
    """What stands at a path that is there."""
    for key in path:
        value = value[key]
    return value


def replace(value: Any, path: Path, new: Any) -> Any:
    """`value` with something else at a path. Lists and objects are changed in place."""
    if not path:
        return new
    fetch(value, path[:-1])[path[-1]] = new
    return value
