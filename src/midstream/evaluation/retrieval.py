"""Does a rewritten question find the passages? Recall over a shared corpus, with BM25."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from midstream.errors import InputError
from midstream.jsonl import read_lines
from midstream.retrieval.bm25 import Bm25Retriever
from midstream.retrieval.folder import read_corpus
from midstream.training.tasks import Row
from midstream.types import Chat, Document, Message

DEPTH = 5


@dataclass(frozen=True, slots=True)
class Query:
    """A conversation whose last turn asks for passages, with the ids of those that are relevant."""

    row: Row
    relevant: frozenset[str]


class Corpus:
    """Passages that BM25 searches."""

    def __init__(self, documents: Sequence[Document]) -> None:
        self._retriever = Bm25Retriever(documents)

    def recall(self, question: str, relevant: frozenset[str]) -> float:
        """Share of the relevant passages among the first 5 found."""
        found = {passage.document.doc_id for passage in self._retriever.search(question, DEPTH)}
        return len(found & relevant) / len(relevant)

    def recalls(self, questions: Sequence[str], queries: Sequence[Query]) -> NDArray[np.float64]:
        """Recall of each question for its query."""
        pairs = zip(questions, queries, strict=True)
        return np.array([self.recall(question, query.relevant) for question, query in pairs])


def read_queries(file: Path, corpus: Sequence[Path], conversations: Sequence[Path]) -> tuple[list[Query], Corpus]:
    """Queries with their conversations, and the corpus.

    Where no files are named, those beside `file` with corpus and conversations in their names are taken. Raises
    DataError for bad rows, InputError where a conversation or every file of a kind is missing.
    """
    corpus = corpus or _beside(file, "corpus")
    conversations = conversations or _beside(file, "conversations")
    turns = {
        c["id"]: c["turns"] for c in read_lines(conversations, lambda row: {"id": row["id"], "turns": row["turns"]})
    }

    def read(row: dict[str, Any]) -> Query:
        if row["conversation"] not in turns:
            raise ValueError(f"conversation {row['conversation']} is in none of the files of conversations")
        chat = _until(turns[row["conversation"]], int(row["turn"]), row["last_turn"])
        target = {"rewritten_question": row["silver_rewrite"]}
        return Query(Row(chat, target, str(row.get("domain", ""))), _ids(row["relevant_doc_ids"]))

    documents = read_corpus(*corpus)
    return read_lines([file], read), Corpus(documents)


def is_query_file(file: Path) -> bool:
    """Whether the rows of a file are retrieval queries."""
    return all(read_lines([file], lambda row: "relevant_doc_ids" in row))


def _ids(value: Any) -> frozenset[str]:
    if not isinstance(value, list) or not value:
        raise ValueError("relevant_doc_ids is no list of ids")
    return frozenset(map(str, value))


def _until(turns: Sequence[dict[str, Any]], turn: int, question: str) -> Chat:
    messages: list[Message] = []
    for earlier in turns[: turn - 1]:
        messages.append(Message(role="user", content=earlier["user"]))
        messages.append(Message(role="assistant", content=earlier["answer"]))
    return Chat(messages=(*messages, Message(role="user", content=question)))


def _beside(file: Path, kind: str) -> list[Path]:
    found = sorted(file.parent.glob(f"*{kind}*.jsonl"))
    if not found:
        raise InputError(f"retrieval needs files of {kind}: none beside {file.name}, name them with --{kind}")
    return found
