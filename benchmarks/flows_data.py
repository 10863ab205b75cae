"""The data of the flows benchmark, and how an answer to it is measured."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from midstream.evaluation.answers import Question, is_right, read_question
from midstream.jsonl import read_lines
from midstream.types import Chat, Document, Message

DOMAINS = ("clapnq", "cloud", "fiqa", "govt")
_QUESTION_FILES = ("arc_challenge.test", "boolq.test", "nq_open.test")


@dataclass(frozen=True, slots=True)
class Turn:
    """A turn of an MTRAG conversation: the turns before it with their reference answers, and what is known of it.

    `documents` are its relevant passages, or where there are none those that were retrieved when it was written.
    """

    id: str
    domain: str
    history: Chat | None
    question: str
    documents: tuple[Document, ...]
    relevant: frozenset[str]
    reference: str
    answerable: bool

    @property
    def chat(self) -> Chat:
        """The conversation up to the question, its documents in the turn."""
        asked = Message(role="user", content=self.question, documents=self.documents)
        return Chat(messages=(*(self.history.messages if self.history else ()), asked))


def questions(folder: Path, count: int) -> list[Question]:
    """As many questions of each of the three held-out files, drawn by a fixed seed."""
    found: list[Question] = []
    for name in _QUESTION_FILES:
        rows = read_lines([folder / "certainty" / f"{name}.jsonl"], read_question)
        random.Random(0).shuffle(rows)
        found += rows[: count // len(_QUESTION_FILES)]
    return found


def corpora(folder: Path) -> dict[str, list[Document]]:
    """The passages of each domain."""
    return {
        domain: read_lines([folder / "rag" / f"mtrag_corpus_{domain}.jsonl"], Document.model_validate)
        for domain in DOMAINS
    }


def turns(folder: Path, *, passages: int, max_words: int) -> list[Turn]:
    """The answerable and unanswerable turns of the held-out conversations that have documents, in a fixed drawn order.

    Histories are cut at their start, whole turns, to `max_words` words together with the documents.
    """
    texts = {document.doc_id: document for each in corpora(folder).values() for document in each}
    rows = read_lines([folder / "rag" / "mtrag_conversations.test.jsonl"], lambda row: row)
    found = [
        turn
        for row in rows
        for index in range(len(row["turns"]))
        if (turn := _turn(row, index, texts, passages, max_words)) is not None
    ]
    random.Random(0).shuffle(found)
    return found


def _turn(
    row: Mapping[str, Any], index: int, texts: Mapping[str, Document], passages: int, max_words: int
) -> Turn | None:
    turn = row["turns"][index]
    if turn["answerability"] not in ("ANSWERABLE", "UNANSWERABLE"):
        return None
    ids = [*turn["relevant_doc_ids"], *turn["other_retrieved_doc_ids"]]
    documents = tuple(texts[name] for name in ids if name in texts)[:passages]
    if not documents:
        return None
    room = max_words - sum(len(document.text.split()) for document in documents)
    return Turn(
        id=f"{row['id']}:{turn['turn']}",
        domain=row["domain"],
        history=_history(row["turns"][:index], room),
        question=turn["user"],
        documents=documents,
        relevant=frozenset(turn["relevant_doc_ids"]),
        reference=turn["answer"],
        answerable=turn["answerability"] == "ANSWERABLE",
    )


def _history(earlier: Sequence[Mapping[str, Any]], room: int) -> Chat | None:
    kept: list[Message] = []
    for turn in reversed(earlier):
        room -= len(turn["user"].split()) + len(turn["answer"].split())
        if room < 0:
            break
        kept = [Message(role="user", content=turn["user"]), Message(role="assistant", content=turn["answer"]), *kept]
    return Chat(messages=tuple(kept)) if kept else None


def right(question: Question, text: str) -> bool:
    """Whether a sampled answer is a right one."""
    return text in question.right if question.options else is_right(text, question.right)


def knowledge_precision(answer: str, documents: Sequence[Document]) -> float:
    """Share of an answer's words that occur in the documents: a measure of groundedness that no adapter was trained
    on (Adlakha et al., 2023, "Evaluating Correctness and Faithfulness of Instruction-Following Models for QA")."""
    known = {word for document in documents for word in words(f"{document.title} {document.text}")}
    said = words(answer)
    return sum(word in known for word in said) / len(said) if said else 0.0


def token_f1(answer: str, reference: str) -> float:
    """F1 of an answer's words against a reference (Rajpurkar et al., 2016)."""
    said, wanted = Counter(words(answer)), Counter(words(reference))
    common = sum((said & wanted).values())
    return 2 * common / (said.total() + wanted.total()) if common else 0.0


def words(text: str) -> list[str]:
    return [word for word in re.findall(r"\w+", text.lower()) if word not in ("a", "an", "the")]
