"""Reading JSON Lines: every line is read, and every bad one is reported, before anything is done with them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from midstream.errors import DataError

T = TypeVar("T")


def read_lines(files: Iterable[Path], read: Callable[[dict[str, Any]], T]) -> list[T]:
    """Every line of some files, through `read`. Raises DataError with every bad line of all files."""
    return read_placed(files, lambda row, place: read(row))


def read_placed(files: Iterable[Path], read: Callable[[dict[str, Any], str], T]) -> list[T]:
    """Like `read_lines`, with each line's place ("rows.jsonl line 3")."""
    found: list[T] = []
    problems: list[str] = []
    for file in files:
        for number, line in enumerate(_lines(file), 1):
            if not line.strip():
                continue
            place = f"{file.name} line {number}"
            try:
                content = json.loads(line)
                if not isinstance(content, dict):
                    raise TypeError(f"a row is a JSON object, not {type(content).__name__}")
                found.append(read(content, place))
            except (ValueError, KeyError, TypeError, AttributeError, IndexError, ValidationError) as error:
                problems.append(f"{place}: {_reason(error)}")
    if problems:
        raise DataError("data", problems)
    if not found:
        raise DataError("data", ["no row in any file"])
    return found


def _lines(file: Path) -> list[str]:
    try:
        # Not splitlines: a text may hold U+2028, which ends no JSON Lines row.
        return file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(str(file), [f"cannot be read: {error}"]) from error


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"field or label {error} is missing or unknown"
    return str(error).splitlines()[0]
