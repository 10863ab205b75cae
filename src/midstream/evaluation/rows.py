"""The rows that an adapter is measured on, from files as they are."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from midstream.backend import Backend
from midstream.errors import InputError
from midstream.evaluation.answers import certainty_rows, read_question
from midstream.evaluation.retrieval import Corpus, Query, is_query_file, read_queries
from midstream.jsonl import read_lines
from midstream.training.augment import with_wrong_documents
from midstream.training.tasks import Row, Task, read_rows

_ANSWERS = 10


@dataclass(frozen=True, slots=True)
class EvalData:
    """Which rows. `train` fits the shortcut baselines; `corpus` and `conversations` serve retrieval queries."""

    files: tuple[Path, ...]
    train: tuple[Path, ...] = ()
    corpus: tuple[Path, ...] = ()
    conversations: tuple[Path, ...] = ()
    max_rows: int | None = None
    wrong_documents: float = 0.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class EvalRows:
    """Rows to measure on. `queries`, one per row, and `corpus` where the rows are retrieval queries."""

    rows: Sequence[Row]
    left_out: int = 0
    train: Sequence[Row] = ()
    queries: Sequence[Query] = ()
    corpus: Corpus | None = None


async def load_rows(backend: Backend, task: Task, data: EvalData) -> EvalRows:
    """Read the files. Raises DataError with every bad row.

    Questions with known answers become rows of `certainty` here: the base model is asked, and one of its answers is
    shown to the adapter.
    """
    if data.wrong_documents and len(task.labels) != 2:
        raise InputError(f"wrong documents are for tasks of two labels, which {task.name} is not")
    if task.name == "query_rewrite" and len(data.files) == 1 and is_query_file(data.files[0]):
        queries, corpus = read_queries(data.files[0], data.corpus, data.conversations)
        picked = _sample(queries, data)
        return EvalRows([query.row for query in picked], queries=picked, corpus=corpus)
    if data.corpus or data.conversations:
        raise InputError("a corpus serves query_rewrite on one file of retrieval queries")
    train, _ = read_rows(data.train, task) if data.train else ([], 0)
    if task.name == "certainty" and _are_questions(data.files):
        questions = _sample(read_lines(data.files, read_question), data)
        answered = await certainty_rows(backend, questions, count=_ANSWERS, seed=data.seed)
        return EvalRows([_named(task, row) for row in answered], train=train)
    rows, left_out = read_rows(data.files, task)
    if data.wrong_documents:
        rows = with_wrong_documents(rows, data.wrong_documents, task.labels, data.seed)
    return EvalRows(_sample(rows, data), left_out, train)


def _sample(rows: Sequence[Any], data: EvalData) -> Sequence[Any]:
    if data.max_rows is None or data.max_rows >= len(rows):
        return rows
    return random.Random(data.seed).sample(list(rows), data.max_rows)


def _named(task: Task, content: dict[str, Any]) -> Row:
    row = task.read(content)
    assert row is not None
    return Row(row.chat, row.target, str(content["source"]), correct=row.correct)


def _are_questions(files: Sequence[Path]) -> bool:
    return all("share" not in row for row in read_lines(files, lambda row: row))
