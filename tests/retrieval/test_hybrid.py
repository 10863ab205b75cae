"""Reciprocal rank fusion."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import numpy as np
import pytest

from midstream.errors import InputError, RetrievalError
from midstream.evaluation.retrieval import read_queries
from midstream.retrieval import (
    Bm25Retriever,
    DenseRetriever,
    HybridRetriever,
    Passage,
    Retriever,
    read_corpus,
    shipped_encoder,
)
from midstream.types import Document
from tests.retrieval.mtrag import FOLDER, QUERIES, needs_mtrag

A, B, C, D = (Document(doc_id=name, text=name) for name in "abcd")


class Fixed:
    """Finds the same documents always, and notes how many it was asked for."""

    def __init__(self, *documents: Document) -> None:
        self.documents = documents
        self.asked: list[int] = []

    async def retrieve(self, query: str, k: int) -> Sequence[Passage]:
        self.asked.append(k)
        return [Passage(document, 1000.0 - i) for i, document in enumerate(self.documents[:k])]


class Broken:
    async def retrieve(self, query: str, k: int) -> Sequence[Passage]:
        raise RetrievalError("it is down")


async def test_ranks_add_up_and_scores_do_not_matter() -> None:
    hybrid = HybridRetriever([Fixed(A, B, C), Fixed(C, B), Fixed(D)])
    assert isinstance(hybrid, Retriever)
    passages = await hybrid.retrieve("?", 10)
    assert [passage.document for passage in passages] == [C, B, A, D]
    assert [passage.score for passage in passages] == pytest.approx(
        [1 / 63 + 1 / 61, 2 / 62, 1 / 61, 1 / 61], abs=1e-12
    )
    assert await hybrid.retrieve("?", 2) == passages[:2]


async def test_documents_are_the_same_when_all_of_them_is() -> None:
    twin = Document(doc_id="a", text="another text under the same id")
    passages = await HybridRetriever([Fixed(A, A, B), Fixed(twin)]).retrieve("?", 5)
    assert [(p.document, p.score) for p in passages] == [(A, 1 / 61), (twin, 1 / 61), (B, 1 / 62)]


async def test_each_is_asked_for_more_than_is_returned() -> None:
    first = Fixed(A, B)
    await HybridRetriever([first], depth=7).retrieve("?", 2)
    await HybridRetriever([first], depth=7).retrieve("?", 20)
    assert first.asked == [7, 20]


async def test_it_stands_on_real_retrievers() -> None:
    documents = [Document(text="red fox"), Document(text="red dog"), Document(text="blue fox")]
    bm25 = Bm25Retriever(documents)
    passages = await HybridRetriever([bm25, bm25]).retrieve("blue fox", 3)
    assert [passage.document for passage in passages] == [documents[2], documents[0]]


async def test_errors_come_through() -> None:
    with pytest.raises(RetrievalError, match="it is down"):
        await HybridRetriever([Fixed(A), Broken()]).retrieve("?", 1)
    with pytest.raises(InputError, match="k is the number"):
        await HybridRetriever([Fixed(A)]).retrieve("?", 0)
    with pytest.raises(InputError, match="no retrievers"):
        HybridRetriever([])
    with pytest.raises(InputError):
        HybridRetriever([Fixed(A)], depth=0)


@needs_mtrag
@pytest.mark.skipif(importlib.util.find_spec("wordllama") is None, reason="needs pip install 'midstream[dense]'")
async def test_words_and_vectors_together_find_more_of_mtrag_than_either() -> None:
    queries, _ = read_queries(QUERIES, [], [])
    documents = read_corpus(*sorted(FOLDER.glob("mtrag_corpus_*.jsonl")))
    words, vectors = Bm25Retriever(documents), DenseRetriever(documents, shipped_encoder())

    async def recall(retriever: Retriever) -> float:
        shares = []
        for query in queries:
            passages = await retriever.retrieve(query.row.target["rewritten_question"], 5)
            found = {passage.document.doc_id for passage in passages}
            shares.append(len(found & query.relevant) / len(query.relevant))
        return float(np.mean(shares))

    # Measured: 0.591 against 0.553 (BM25) and 0.540 (vectors).
    single = max(await recall(words), await recall(vectors))
    assert await recall(HybridRetriever([words, vectors])) > single + 0.02
