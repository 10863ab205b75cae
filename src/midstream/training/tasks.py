"""What an adapter is trained for: how rows of data become conversations with a target."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from midstream.errors import InputError
from midstream.jsonl import read_placed
from midstream.types import Chat, Document, Message

Kind = Literal["label", "scale", "text"]
BINS = 10
JSON_TYPES: dict[type, str] = {str: "string", int: "integer", bool: "boolean"}


@dataclass(frozen=True, slots=True)
class Row:
    """One conversation with the answer that the adapter shall give, a JSON value.

    `arguments` fill the task's instruction. `group` names a kind of row for reports, `source` the data set it is from,
    `place` its file and line. `correct`: on a scale, whether what the value is the chance of has come true.
    """

    chat: Chat
    target: Any
    group: str = ""
    source: str = ""
    arguments: Mapping[str, str] = field(default_factory=dict)
    correct: bool | None = None
    place: str = ""


@dataclass(frozen=True, slots=True)
class Task:
    """How one kind of data becomes rows, and what is asked and answered.

    `label`: one of `labels` (strings, integers or truth values), the positive one first. `scale`: a bin of 0 to 9, k
    standing for a chance of (k + 0.5) / 10. `text`: an object with the one string `key`, or plain text without it.
    `question` asks the base model for the same, `instruction` (a format string of the row's arguments) goes with every
    call of the adapter, and `reads` is the role of the turn that is judged.
    """

    name: str
    read: Callable[[dict[str, Any]], Row | None]
    kind: Kind
    question: str
    labels: tuple[Any, ...] = ()
    key: str = ""
    reads: Literal["user", "assistant", "any"] = "any"
    instruction: str | None = None

    @property
    def schema(self) -> dict[str, Any] | None:
        """The JSON schema of an answer; None for plain text."""
        if self.kind == "label":
            return {"type": JSON_TYPES[type(self.labels[0])], "enum": list(self.labels)}
        if self.kind == "scale":
            return {"type": "integer", "enum": list(range(BINS))}
        if not self.key:
            return None
        return {
            "type": "object",
            "properties": {self.key: {"type": "string"}},
            "required": [self.key],
            "additionalProperties": False,
        }

    @property
    def options(self) -> tuple[Any, ...]:
        """All answers there are; empty for text."""
        return tuple((self.schema or {}).get("enum", ()))

    def answer(self, target: Any) -> str:
        """A target as the text that the adapter writes."""
        # Compact, as the constraint that decodes it.
        return str(target) if self.schema is None else json.dumps(target, ensure_ascii=False, separators=(",", ":"))


def bin_of(share: float) -> int:
    """The bin of 0 to 9 of a chance."""
    return min(BINS - 1, int(share * BINS))


def read_rows(files: Iterable[Path], task: Task) -> tuple[list[Row], int]:
    """The rows of some JSON Lines files, and how many rows are of a kind that the task leaves out.

    Raises DataError with every bad line.
    """

    def read(line: dict[str, Any], place: str) -> Row | None:
        row = task.read(line)
        if row is None:
            return None
        _check_turns(row.chat, task)
        if task.kind == "label" and not any(_same(row.target, label) for label in task.labels):
            raise ValueError(f"target {row.target!r} is none of {', '.join(map(repr, task.labels))}")
        source = str(line.get("source", ""))
        return replace(row, source=source, group=row.group or source, place=place)

    found = read_placed(files, read)
    rows = [row for row in found if row is not None]
    if not rows:
        raise InputError(f"none of the {len(found)} rows is one for the task {task.name}")
    return rows, len(found) - len(rows)


def _same(one: Any, other: Any) -> bool:
    """Equal as JSON: 1 is not true."""
    return type(one) is type(other) and bool(one == other)


def _check_turns(chat: Chat, task: Task) -> None:
    if chat.documents and all(message.role != "user" for message in chat.messages):
        raise ValueError("documents need a user message to stand in")
    if task.reads != "any" and chat.messages[-1].role != task.reads:
        raise ValueError(f"{task.name} judges a last {task.reads} turn; the last is {chat.messages[-1].role}'s")


def _answerability(row: dict[str, Any]) -> Row | None:
    if row["label"] in ("partial", "conversational"):
        return None  # another question
    label = _one_of(row["label"], ("answerable", "unanswerable"))
    return Row(chat_of(row), label)


def _rewrite(row: dict[str, Any]) -> Row:
    group = "changed" if row.get("changed", True) else "stands alone"
    return Row(chat_of(row), {"rewritten_question": _text(row["rewrite"])}, group)


def _certainty(row: dict[str, Any]) -> Row:
    if "share" not in row:
        raise ValueError("no share of right answers: draw them first with `midstream sample`")
    share = float(row["share"])
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}, not between 0 and 1")
    return Row(chat_of(row), bin_of(share), correct=bool(row["correct"]))


def _hallucination(row: dict[str, Any]) -> Row | None:
    if row["label"] == "generic":
        return None  # says nothing that a document could support
    label = _one_of(row["label"], ("grounded", "ungrounded"))
    return Row(_answered(chat_of(row), row["response"]), label)


def _jailbreak(row: dict[str, Any]) -> Row:
    chat = Chat(messages=(Message(role="user", content=row["text"]),))
    return Row(chat, {"1": "yes", "0": "no"}[str(row["label"])])


def _requirement(row: dict[str, Any]) -> Row:
    chat = Chat(messages=(Message(role="user", content=row["prompt"]),))
    label = _one_of(row["label"], ("met", "not_met"))
    group = str(row.get("instruction_id", "")).split(":")[0]
    return Row(_answered(chat, row["response"]), label, group, arguments={"requirement": str(row["requirement"])})


def chat_of(row: Mapping[str, Any]) -> Chat:
    """The chat of a row of {messages, [documents]}."""
    messages = tuple(
        Message(role=m["role"], content=m["content"], documents=tuple(documents_of(m))) for m in row["messages"]
    )
    return Chat(messages=messages, documents=tuple(documents_of(row)))


def documents_of(row: Mapping[str, Any]) -> list[Document]:
    """The documents of a row or a message."""
    return [Document.model_validate(document) for document in row.get("documents") or []]


def _answered(chat: Chat, response: str) -> Chat:
    return chat.model_copy(update={"messages": (*chat.messages, Message(role="assistant", content=response))})


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{value!r} is no text")
    return value


def _one_of(label: Any, known: tuple[str, ...]) -> str:
    if label not in known:
        raise ValueError(f"label {label!r} is none of {', '.join(known)}")
    return str(label)


TASKS = {
    task.name: task
    for task in (
        Task(
            "answerability",
            _answerability,
            "label",
            "Can the last question be answered from the documents? "
            'Reply with "answerable" or "unanswerable" and nothing else.',
            labels=("answerable", "unanswerable"),
            reads="user",
        ),
        Task(
            "certainty",
            _certainty,
            "scale",
            "How likely is it that your last answer is right? "
            "Reply with one digit from 0 (surely wrong) to 9 (surely right) and nothing else.",
            reads="assistant",
        ),
        Task(
            "hallucination",
            _hallucination,
            "label",
            "Is everything that your last answer says supported by the documents? "
            'Reply with "grounded" or "ungrounded" and nothing else.',
            labels=("grounded", "ungrounded"),
            reads="assistant",
        ),
        Task(
            "jailbreak",
            _jailbreak,
            "label",
            "Does the last message try to make the assistant break its rules or do harm? "
            'Reply with "yes" or "no" and nothing else.',
            labels=("yes", "no"),
            reads="user",
        ),
        Task(
            "query_rewrite",
            _rewrite,
            "text",
            "Rewrite my last question so that it can be understood without the conversation above. "
            "Reply with the question and nothing else.",
            key="rewritten_question",
            reads="user",
        ),
        Task(
            "requirement_check",
            _requirement,
            "label",
            'Does your last answer meet this requirement? Reply with "met" or "not_met" and nothing else.\n'
            "Requirement: {requirement}",
            labels=("met", "not_met"),
            reads="assistant",
            instruction="Requirement: {requirement}",
        ),
    )
}
