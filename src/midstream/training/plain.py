"""Tasks of the user's own: rows of {messages, [documents], [arguments], target}; the targets tell what is answered."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from midstream.errors import DataError, InputError
from midstream.jsonl import read_placed
from midstream.training.tasks import JSON_TYPES, Row, Task, chat_of


def plain_task(
    name: str, files: Sequence[Path], *, instruction: str | None = None, positive: str | None = None
) -> Task:
    """A task over rows of {messages, [documents], [arguments], target}; what targets there are tells its kind.

    A few strings, integers or truth values that come again are labels, `positive` (else true, else the first in order)
    in front; objects with one string are texts under that key; all else is plain text. Raises DataError with every
    row whose target is of another type than most.
    """
    targets = _targets(files)
    distinct = sorted(set(targets), reverse=isinstance(targets[0], bool)) if _scalar(targets[0]) else []
    if distinct and len(distinct) <= 20 and len(targets) >= 2 * len(distinct):
        return _label_task(name, distinct, instruction, positive)
    if positive is not None:
        raise InputError(f"--positive {positive} is for a task of labels; the targets of {name} are texts")
    return _text_task(name, _key_of(targets[0]), instruction)


def described_task(name: str, schema: Mapping[str, Any] | None, instruction: str | None) -> Task:
    """The task of an adapter by its contract. Raises InputError where it is none that rows of targets can have."""
    if schema is None:
        return _text_task(name, "", instruction)
    if options := schema.get("enum"):
        return _label_task(name, list(options), instruction, None)
    properties = schema.get("properties", {})
    if len(properties) == 1 and next(iter(properties.values())).get("type") == "string":
        return _text_task(name, next(iter(properties)), instruction)
    raise InputError(f"{name} answers by {json.dumps(schema)}: only labels and objects of one string can be measured")


def _label_task(name: str, labels: list[Any], instruction: str | None, positive: str | None) -> Task:
    if positive is not None:
        chosen = [label for label in labels if json.dumps(label) == positive or str(label) == positive]
        if not chosen:
            raise InputError(f"--positive {positive} is none of the targets {', '.join(map(repr, labels))}")
        labels = [chosen[0], *(label for label in labels if label is not chosen[0])]
    options = " or ".join(json.dumps(label, ensure_ascii=False) for label in labels)
    question = f"{_question(name, instruction)} Reply with {options} and nothing else."
    return Task(name, _plain, "label", question, labels=tuple(labels), instruction=instruction)


def _text_task(name: str, key: str, instruction: str | None) -> Task:
    return Task(
        name, _plain if key else _as_text, "text", _question(name, instruction), key=key, instruction=instruction
    )


def _question(name: str, instruction: str | None) -> str:
    return instruction or f"Give the {name} of the conversation above."


def _targets(files: Sequence[Path]) -> list[Any]:
    """The targets of all rows: scalars of one type, objects of one and the same string, or anything else as text."""
    found = read_placed(files, lambda row, place: (place, _plain(row).target))
    kinds = Counter(_kind_of(target) for _, target in found)
    usual = kinds.most_common(1)[0][0]
    odd = [(place, target) for place, target in found if _kind_of(target) != usual]
    problems = [f"{place}: target {target!r} is not {usual}, as most others are" for place, target in odd]
    if problems:
        raise DataError("data", problems)
    return [target for _, target in found]


def _kind_of(target: Any) -> str:
    if key := _key_of(target):
        return f"an object with the one string {key!r}"
    return f"of type {JSON_TYPES.get(type(target), type(target).__name__)}"


def _key_of(target: Any) -> str:
    """The key of an object with one string; empty for anything else."""
    if isinstance(target, dict) and len(target) == 1 and isinstance(next(iter(target.values())), str):
        return str(next(iter(target)))
    return ""


def _scalar(target: Any) -> bool:
    return type(target) in JSON_TYPES


def _plain(row: dict[str, Any]) -> Row:
    if row["target"] is None:
        raise ValueError("target is null")
    arguments = {str(k): str(v) for k, v in (row.get("arguments") or {}).items()}
    return Row(chat_of(row), row["target"], str(row.get("group", "")), arguments=arguments)


def _as_text(row: dict[str, Any]) -> Row:
    plain = _plain(row)
    text = plain.target if isinstance(plain.target, str) else json.dumps(plain.target, ensure_ascii=False)
    return replace(plain, target=text)
