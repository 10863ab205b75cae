"""More rows from rows: wrong passages, and turns that stand deep in a conversation."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from midstream.jsonl import read_lines
from midstream.training.tasks import Row, documents_of
from midstream.types import Chat, Message


def with_wrong_documents(rows: Sequence[Row], share: float, labels: Sequence[str], seed: int) -> list[Row]:
    """Rows plus a `share` of the positive ones again, with another row's passages and the negative label.

    What a retriever that erred brings. `labels`: positive, negative.
    """
    rng = random.Random(seed)
    positive = [row for row in rows if row.target == labels[0] and row.chat.documents]
    wrong: list[Row] = []
    for row in rng.sample(positive, int(len(positive) * share)):
        known = _passages(row)
        others = [o for o in rng.sample(positive, min(50, len(positive))) if _passages(o).isdisjoint(known)]
        if others:
            chat = row.chat.model_copy(update={"documents": others[0].chat.documents})
            wrong.append(replace(row, chat=chat, target=labels[-1], group="wrong documents"))
    return [*rows, *wrong]


def read_histories(files: Iterable[Path]) -> list[Row]:
    """Question, passages and answer as earlier turns, from rows of {messages, documents, answer or answers}."""

    def read(row: dict[str, Any]) -> Row:
        answers = row.get("answers") or [row.get("answer") or "I do not know."]
        question = Message(role="user", content=row["messages"][-1]["content"], documents=tuple(documents_of(row)))
        chat = Chat(messages=(question, Message(role="assistant", content=str(answers[0]))))
        return Row(chat, None, source=str(row.get("source", "")))

    return read_lines(files, read)


def within_histories(
    rows: Sequence[Row], histories: Sequence[Row], share: float, negative: str, seed: int
) -> list[Row]:
    """Rows with a `share` of them set after an earlier turn, and as many plain questions over passages as `negative`.

    Without these an adapter that judges a turn learns that whatever stands in a long conversation is suspect.
    """
    rng = random.Random(seed)
    later = set(rng.sample(range(len(rows)), int(len(rows) * share)))
    placed = [_after(row, rng.choice(histories)) if i in later else row for i, row in enumerate(rows)]
    questions = [_question(history, negative) for history in rng.choices(histories, k=len(later))]
    return [*placed, *questions[::2], *(_after(row, rng.choice(histories)) for row in questions[1::2])]


def _question(history: Row, negative: str) -> Row:
    return Row(Chat(messages=history.chat.messages[:1]), negative, "question over passages", history.source)


def _after(row: Row, history: Row) -> Row:
    messages = (*history.chat.messages, *row.chat.messages)
    return replace(row, chat=row.chat.model_copy(update={"messages": messages}))


def _passages(row: Row) -> set[str]:
    return {document.title or document.text for document in row.chat.documents}
