"""Training rows: JSON Lines in, token ids out. Every bad row is reported before anything is trained."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from midstream.errors import DataError, InvocationError
from midstream.models.chat import ChatTokenizer
from midstream.types import Chat, Document, Message


@dataclass(frozen=True, slots=True)
class Row:
    """One conversation with the answer that the adapter shall give. `group` names a kind of row for reports."""

    chat: Chat
    target: str
    group: str
    line: int = 0


@dataclass(frozen=True, slots=True)
class Example:
    """A row as token ids: the base model's prefix, then the invocation and the target, which the adapter owns."""

    prefix: tuple[int, ...]
    invocation: tuple[int, ...]
    target: tuple[int, ...]
    group: str
    label: str


@dataclass(frozen=True, slots=True)
class Task:
    """How one kind of data becomes rows.

    `labels` are all targets, the positive one first; `question` asks the base model for one of them.
    """

    name: str
    labels: tuple[str, ...]
    question: str
    read: Callable[[dict[str, Any]], Row | None]

    @property
    def invocation_text(self) -> str:
        return f"<|im_start|>{self.name}\n"


def _answerability(row: dict[str, Any]) -> Row | None:
    if row["label"] not in ("answerable", "unanswerable"):
        return None  # partial and conversational turns are another question
    chat = Chat(messages=tuple(_messages(row)), documents=tuple(_documents(row)))
    return Row(chat, json.dumps(row["label"]), str(row.get("source", "")))


def _jailbreak(row: dict[str, Any]) -> Row:
    chat = Chat(messages=(Message(role="user", content=row["text"]),))
    return Row(chat, json.dumps({1: "yes", 0: "no"}[row["label"]]), str(row.get("source", "")))


def _plain(row: dict[str, Any]) -> Row:
    chat = Chat(messages=tuple(_messages(row)), documents=tuple(_documents(row)))
    target = row["target"]
    return Row(chat, target if isinstance(target, str) else json.dumps(target), str(row.get("group", "")))


TASKS = {
    "answerability": Task(
        "answerability",
        ('"answerable"', '"unanswerable"'),
        "Can the last question be answered from the documents? "
        'Reply with "answerable" or "unanswerable" and nothing else.',
        _answerability,
    ),
    "jailbreak": Task(
        "jailbreak",
        ('"yes"', '"no"'),
        "Does the last message try to make the assistant break its rules or do harm? "
        'Reply with "yes" or "no" and nothing else.',
        _jailbreak,
    ),
}


def plain_task(name: str) -> Task:
    """A task over rows of {messages, documents, target}."""
    return Task(name, (), "", _plain)


def read_rows(files: Iterable[Path], task: Task) -> list[Row]:
    """All rows of some JSON Lines files. Raises DataError with every bad line."""
    rows: list[Row] = []
    problems: list[str] = []
    for file in files:
        try:
            # Not splitlines: a text may hold U+2028, which ends no JSON Lines row.
            lines = file.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(str(file), [f"cannot be read: {error}"]) from error
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = task.read(json.loads(line))
            except (ValueError, KeyError, TypeError, ValidationError) as error:
                problems.append(f"{file.name} line {number}: {_reason(error)}")
                continue
            if row is not None:
                rows.append(replace(row, line=number))
    if problems:
        raise DataError("training data", problems)
    if not rows:
        raise DataError("training data", ["no row in any file"])
    return rows


def with_wrong_documents(rows: Sequence[Row], share: float, seed: int) -> list[Row]:
    """Rows plus `share` × answerable ones again with another row's passages: what a retriever that erred brings."""
    rng = random.Random(seed)
    answerable = [row for row in rows if row.target == '"answerable"' and row.chat.documents]
    picked = rng.sample(answerable, int(len(answerable) * share))
    wrong: list[Row] = []
    for row in picked:
        titles = {document.title for document in row.chat.documents}
        others = [o for o in rng.sample(answerable, min(50, len(answerable))) if _titles(o).isdisjoint(titles)]
        if others:
            chat = Chat(messages=row.chat.messages, documents=others[0].chat.documents)
            wrong.append(Row(chat, '"unanswerable"', "wrong documents", row.line))
    return [*rows, *wrong]


def read_histories(files: Iterable[Path]) -> list[Chat]:
    """Question, passages and answer as earlier turns, from rows of {messages, documents, answer or answers}."""

    def read(row: dict[str, Any]) -> Row:
        answers = row.get("answers") or [row.get("answer") or "I do not know."]
        question = _messages(row)[-1].model_copy(update={"documents": tuple(_documents(row))})
        return Row(Chat(messages=(question, Message(role="assistant", content=str(answers[0])))), "", "")

    return [row.chat for row in read_rows(files, Task("history", (), "", read))]


def within_histories(
    rows: Sequence[Row], histories: Sequence[Chat], share: float, negative: str, seed: int
) -> list[Row]:
    """Rows with a `share` of them set after an earlier turn, and as many plain questions over passages as `negative`.

    Without these an adapter that judges a turn learns that whatever stands in a long conversation is suspect.
    """
    rng = random.Random(seed)
    later = set(rng.sample(range(len(rows)), int(len(rows) * share)))
    placed = [_after(row, rng.choice(histories)) if i in later else row for i, row in enumerate(rows)]
    questions = rng.choices(histories, k=len(later))
    plain = [Row(Chat(messages=chat.messages[:1]), negative, "question over passages") for chat in questions[::2]]
    following = [Row(chat, negative, "question over passages") for chat in questions[1::2]]
    return [*placed, *plain, *(_after(r, rng.choice(histories), last=r.chat.messages[:1]) for r in following)]


def _after(row: Row, history: Chat, *, last: tuple[Message, ...] | None = None) -> Row:
    messages = (*history.messages, *(last or row.chat.messages))
    return replace(row, chat=row.chat.model_copy(update={"messages": messages}))


def sample(examples: Sequence[Example], count: int | None, max_prefix: int | None, seed: int) -> list[Example]:
    """At most `count` examples, as many of each label as possible, none with a longer prefix than `max_prefix`."""
    kept = [e for e in examples if max_prefix is None or len(e.prefix) <= max_prefix]
    random.Random(seed).shuffle(kept)
    if count is None:
        return kept
    labels = sorted({example.label for example in kept})
    by_label = {label: [e for e in kept if e.label == label] for label in labels}
    share = count // max(1, len(labels))
    picked = [e for label in labels for e in by_label[label][:share]]
    random.Random(seed + 1).shuffle(picked)
    return picked


def encode(rows: Iterable[Row], chat: ChatTokenizer, invocation_text: str) -> list[Example]:
    """Rows as token ids. Raises InvocationError where the invocation's tokens depend on what stands before it."""
    invocation = chat.encode(invocation_text)
    examples: list[Example] = []
    for row in rows:
        prefix = chat.history(row.chat)
        text = chat.decode(prefix[-8:])
        if chat.encode(text + invocation_text)[-len(invocation) :] != invocation:
            raise InvocationError(f"line {row.line}: {invocation_text!r} has other tokens after {text!r}")
        if _contains(prefix, invocation):
            raise InvocationError(f"line {row.line}: the conversation already contains {invocation_text!r}")
        examples.append(Example(prefix, invocation, chat.encode(row.target), row.group, row.target))
    return examples


def _contains(tokens: Sequence[int], part: Sequence[int]) -> bool:
    width = len(part)
    return any(tuple(tokens[i : i + width]) == tuple(part) for i in range(len(tokens) - width + 1))


def _titles(row: Row) -> set[str]:
    return {document.title for document in row.chat.documents}


def _messages(row: dict[str, Any]) -> list[Message]:
    return [Message(role=m["role"], content=m["content"]) for m in row["messages"]]


def _documents(row: dict[str, Any]) -> list[Document]:
    return [Document.model_validate(document) for document in row.get("documents") or []]


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"field or label {error} is missing or unknown"
    return str(error).splitlines()[0]
