"""What an adapter is trained for: how rows of data become conversations with a target."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from midstream.training.jsonl import read_lines
from midstream.types import Chat, Document, Message

Kind = Literal["label", "scale", "text"]
BINS = 10


@dataclass(frozen=True, slots=True)
class Row:
    """One conversation with the answer that the adapter shall give, a JSON value.

    `arguments` fill the task's instruction. `group` names a kind of row for reports, `source` the data set it is from.
    `correct`: on a scale, whether what the value is the chance of has come true.
    """

    chat: Chat
    target: Any
    group: str = ""
    source: str = ""
    arguments: Mapping[str, str] = field(default_factory=dict)
    correct: bool | None = None


@dataclass(frozen=True, slots=True)
class Task:
    """How one kind of data becomes rows, and what is asked and answered.

    `label`: one of `labels`, the positive one first. `scale`: a bin of 0 to 9, k standing for a chance of
    (k + 0.5) / 10. `text`: an object with the one string `key`, or plain text without it. `question` asks the base
    model for the same, `instruction` (a format string of the row's arguments) goes with every call of the adapter,
    and `reads` is the role of the turn that is judged.
    """

    name: str
    read: Callable[[dict[str, Any]], Row | None]
    kind: Kind
    question: str
    labels: tuple[str, ...] = ()
    key: str = ""
    reads: Literal["user", "assistant", "any"] = "any"
    instruction: str | None = None

    @property
    def schema(self) -> dict[str, Any] | None:
        """The JSON schema of an answer; None for plain text."""
        if self.kind == "label":
            return {"type": "string", "enum": list(self.labels)}
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

    def read(line: dict[str, Any]) -> Row | None:
        row = task.read(line)
        source = str(line.get("source", ""))
        return row and replace(row, source=source, group=row.group or source)

    found = read_lines(files, read)
    rows = [row for row in found if row is not None]
    return rows, len(found) - len(rows)


def plain_task(name: str, files: Sequence[Path], instruction: str | None = None) -> Task:
    """A task over rows of {messages, [documents], [arguments], target}; what targets there are tells its kind.

    A few values that come again are labels; objects with one string are texts under that key; all else is plain text.
    """
    targets = [row.target for row in read_lines(files, _plain)]
    task = Task(name, _as_text, "text", f"Give the {name} of the conversation above.", instruction=instruction)
    distinct = sorted({target for target in targets if isinstance(target, str)})
    if all(isinstance(t, str) for t in targets) and len(distinct) <= 20 and len(targets) >= 2 * len(distinct):
        options = " or ".join(f'"{label}"' for label in distinct)
        question = f"{task.question} Reply with {options} and nothing else."
        return replace(task, read=_plain, kind="label", question=question, labels=tuple(distinct))
    keys = {tuple(t) if isinstance(t, dict) else () for t in targets}
    if len(keys) == 1 and len(key := keys.pop()) == 1 and all(isinstance(t[key[0]], str) for t in targets):
        return replace(task, read=_plain, key=key[0])
    return task


def _answerability(row: dict[str, Any]) -> Row | None:
    if row["label"] in ("partial", "conversational"):
        return None  # another question
    label = _one_of(row["label"], ("answerable", "unanswerable"))
    return Row(_chat(row), label)


def _rewrite(row: dict[str, Any]) -> Row:
    group = "changed" if row.get("changed", True) else "stands alone"
    return Row(_chat(row), {"rewritten_question": row["rewrite"]}, group)


def _certainty(row: dict[str, Any]) -> Row:
    if "share" not in row:
        raise ValueError("no share of right answers: draw them first with `midstream sample`")
    share = float(row["share"])
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}, not between 0 and 1")
    return Row(_chat(row), bin_of(share), correct=bool(row["correct"]))


def _hallucination(row: dict[str, Any]) -> Row | None:
    if row["label"] == "generic":
        return None  # says nothing that a document could support
    label = _one_of(row["label"], ("grounded", "ungrounded"))
    return Row(_answered(_chat(row), row["response"]), label)


def _jailbreak(row: dict[str, Any]) -> Row:
    chat = Chat(messages=(Message(role="user", content=row["text"]),))
    return Row(chat, {1: "yes", 0: "no"}[row["label"]])


def _requirement(row: dict[str, Any]) -> Row:
    chat = Chat(messages=(Message(role="user", content=row["prompt"]),))
    label = _one_of(row["label"], ("met", "not_met"))
    group = str(row.get("instruction_id", "")).split(":")[0]
    return Row(_answered(chat, row["response"]), label, group, arguments={"requirement": str(row["requirement"])})


def _plain(row: dict[str, Any]) -> Row:
    arguments = {str(k): str(v) for k, v in (row.get("arguments") or {}).items()}
    return Row(_chat(row), row["target"], str(row.get("group", "")), arguments=arguments)


def _as_text(row: dict[str, Any]) -> Row:
    plain = _plain(row)
    text = plain.target if isinstance(plain.target, str) else json.dumps(plain.target, ensure_ascii=False)
    return replace(plain, target=text)


def _chat(row: Mapping[str, Any]) -> Chat:
    messages = tuple(
        Message(role=m["role"], content=m["content"], documents=tuple(_documents(m))) for m in row["messages"]
    )
    return Chat(messages=messages, documents=tuple(_documents(row)))


def _documents(row: Mapping[str, Any]) -> list[Document]:
    return [Document.model_validate(document) for document in row.get("documents") or []]


def _answered(chat: Chat, response: str) -> Chat:
    return chat.model_copy(update={"messages": (*chat.messages, Message(role="assistant", content=response))})


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
