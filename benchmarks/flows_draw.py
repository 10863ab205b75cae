"""The draws of the flows benchmark: each row of data is run once, kept on a line of its own, and never run again."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.flows_data import Turn, knowledge_precision, right, token_f1, words
from midstream.evaluation.answers import Question
from midstream.flows.best_of_n import BestOfN, BestOfNSettings, best_of_n
from midstream.flows.majority import MajoritySettings, majority
from midstream.flows.rag import RagSettings, RagTurn, rag_turn
from midstream.flows.run import Run
from midstream.intrinsics import answerability
from midstream.retrieval import Bm25Retriever
from midstream.session import Engine
from midstream.transcript import Transcript
from midstream.types import Chat, Choice, SamplingParams

_ANSWER = 64  # tokens of an answer from documents


class Raw:
    """Raw results, one a line, without texts. A row is done when its part and id are there."""

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        self._rows = {(row["part"], row["id"]): row for row in map(json.loads, lines)}

    def part(self, name: str) -> list[dict[str, Any]]:
        """The rows of a part."""
        return [row for (part, _), row in self._rows.items() if part == name]

    def fill(self, part: str, items: Iterable[tuple[str, Callable[[], Mapping[str, Any]]]], deadline: float) -> None:
        """Run what is not done yet, until the deadline (of time.monotonic) passes."""
        for name, run in items:
            if (part, name) in self._rows:
                continue
            if time.monotonic() > deadline:
                return
            row = {"part": part, "id": name, **run()}
            self._rows[part, name] = row
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            print(part, name, f"{row['seconds']:.1f} s", flush=True)


def draw_right(engine: Engine, question: Question, n: int) -> dict[str, Any]:
    """`n` answers to a question with a known one, each scored by certainty (and by groundedness, where it has a
    passage). `quality`: whether it is right."""
    params = SamplingParams(
        temperature=0.7,
        max_tokens=max(16, 4 * max(map(len, question.options), default=0)),
        stop=() if question.options else ("\n",),
        constraint=Choice(options=tuple(dict.fromkeys(question.options))) if question.options else None,
    )
    settings = BestOfNSettings(n=n, params=params, weights={"hallucination": 1, "certainty": 1})
    result = engine.run(best_of_n(engine.aio, question.chat, settings, run=Run(seed=_seed(question.id))))
    result.raise_for_error()
    quality = {c.index: {"quality": float(right(question, c.text.strip()))} for c in result.candidates}
    return {"group": question.source, **_row(result, quality)}


def draw_grounded(engine: Engine, turn: Turn, n: int) -> dict[str, Any]:
    """`n` answers from a turn's passages, scored by groundedness and by certainty. `quality`: knowledge precision."""
    settings = BestOfNSettings(
        n=n,
        params=SamplingParams(temperature=0.8, max_tokens=_ANSWER),
        weights={"hallucination": 1, "certainty": 1},
    )
    result = engine.run(best_of_n(engine.aio, turn.chat, settings, run=Run(seed=_seed(turn.id))))
    result.raise_for_error()
    quality = {
        c.index: {
            "quality": knowledge_precision(c.text, turn.documents),
            "f1": token_f1(c.text, turn.reference),
        }
        for c in result.candidates
    }
    return {"group": turn.domain, "answerable": turn.answerable, **_row(result, quality)}


def draw_unscored(engine: Engine, turn: Turn, n: int) -> tuple[float, int]:
    """Seconds and tokens of the same answers without their scores."""
    settings = MajoritySettings(n=n, params=SamplingParams(temperature=0.8, max_tokens=_ANSWER))
    result = engine.run(majority(engine.aio, turn.chat, settings, run=Run(seed=_seed(turn.id))))
    result.raise_for_error()
    return result.seconds, result.tokens_spent


def _row(result: BestOfN, quality: Mapping[int, Mapping[str, float]]) -> dict[str, Any]:
    candidates = [
        {
            **quality[c.index],
            "key": hashlib.sha256(" ".join(words(c.text)).encode()).hexdigest()[:12],
            "scores": {name: round(score, 6) for name, score in c.scores.items()},
            "generating_tokens": c.generating_tokens,
            "judging_tokens": c.judging_tokens,
        }
        for c in result.candidates
    ]
    return {"seconds": result.seconds, "tokens": result.tokens_spent, "candidates": candidates}


def draw_gate(engine: Engine, turn: Turn, retriever: Bm25Retriever) -> dict[str, Any]:
    """Answerability of a turn from its own passages, and from those that its bare question finds."""
    started = time.perf_counter()
    found = tuple(passage.document for passage in retriever.search(turn.question, 3))
    scores = {}
    for name, documents in (("given", turn.documents), ("retrieved", found)):
        if documents:
            last = turn.chat.messages[-1].model_copy(update={"documents": documents})
            chat = Chat(messages=(*turn.chat.messages[:-1], last))
            scores[name] = engine.run(answerability(engine.aio, chat)).probability
    return {"answerable": turn.answerable, "scores": scores, "seconds": time.perf_counter() - started}


def play_turn(engine: Engine, turn: Turn, retriever: Bm25Retriever, settings: RagSettings) -> dict[str, Any]:
    """A turn of the RAG flow, and what it is worth."""
    before = Transcript() if turn.history is None else turn.history
    run = Run(seed=_seed(turn.id))
    result = engine.run(rag_turn(engine.aio, before, turn.question, retriever, settings, run=run))
    result.raise_for_error()
    found = {passage.document.doc_id for passage in result.passages}
    return {
        "group": turn.domain,
        "answerable": turn.answerable,
        "recall": len(found & turn.relevant) / len(turn.relevant) if turn.relevant else None,
        "f1": token_f1(result.answer, turn.reference),
        "precision": knowledge_precision(result.answer, [p.document for p in result.passages]),
        **_turn_row(result),
    }


def _turn_row(result: RagTurn) -> dict[str, Any]:
    return {
        "outcome": result.outcome,
        "scores": dict(result.scores),
        "trusted": result.trusted,
        "tokens": result.tokens_spent,
        "seconds": result.seconds,
    }


def _seed(name: str) -> int:
    return sum(ord(letter) * 31**place for place, letter in enumerate(name)) % 2**31
