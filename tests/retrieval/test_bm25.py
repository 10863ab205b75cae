"""BM25: what is found, in which order, and what asks for nothing."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from midstream.errors import InputError
from midstream.evaluation.retrieval import read_queries
from midstream.retrieval import Bm25Retriever, Retriever
from midstream.types import Document
from tests.retrieval.mtrag import QUERIES, needs_mtrag

DOCUMENTS = [
    Document(doc_id="reef", title="Great Barrier Reef", text="It lies off Queensland."),
    Document(doc_id="fox", text="The quick brown fox jumps."),
    Document(doc_id="corals", text="A reef is built by corals, and a reef is old."),
    Document(doc_id="fox", text="The quick brown fox jumps."),
    Document(doc_id="dog", text="The lazy dog sleeps."),
]


def found(retriever: Bm25Retriever, query: str, k: int = 10) -> list[str]:
    return [passage.document.doc_id for passage in retriever.search(query, k)]


async def test_what_shares_no_word_is_not_found() -> None:
    retriever = Bm25Retriever(DOCUMENTS)
    assert isinstance(retriever, Retriever)
    passages = await retriever.retrieve("Where are reef and corals?", 10)
    assert [passage.document for passage in passages] == [DOCUMENTS[2], DOCUMENTS[0]]
    assert passages[0].score > passages[1].score > 0
    assert found(retriever, "barrier") == ["reef"], "titles are searched"
    assert found(retriever, "reef corals", 1) == ["corals"]


@pytest.mark.parametrize("query", ["", "  ", "the and of", "zebra", "?!"])
def test_such_a_query_finds_nothing(query: str) -> None:
    assert found(Bm25Retriever(DOCUMENTS), query) == []


@pytest.mark.parametrize("documents", [[], [Document(text="")], [Document(text="the of"), Document(text="!")]])
def test_a_corpus_without_words_is_searched_in_vain(documents: list[Document]) -> None:
    assert found(Bm25Retriever(documents), "reef") == []


def test_an_unknown_word_takes_nothing_from_the_known_ones() -> None:
    retriever = Bm25Retriever(DOCUMENTS)
    assert retriever.search("zebra reef", 5) == retriever.search("reef", 5) != []


def test_equal_scores_keep_the_order_of_the_documents() -> None:
    documents = [Document(doc_id=str(i), text="same words here" if i % 3 else "other text") for i in range(400)]
    same = [str(i) for i in range(400) if i % 3]
    retriever = Bm25Retriever(documents)
    for k in (1, 7, 250, 1000):
        assert found(retriever, "words", k) == same[:k]
    better = Bm25Retriever([*documents, Document(doc_id="best", text="words words")])
    assert found(better, "words", 3) == ["best", "1", "2"]


def test_stop_words_are_the_callers() -> None:
    assert found(Bm25Retriever(DOCUMENTS, stopwords=[]), "the") == ["dog", "fox", "fox"]
    assert found(Bm25Retriever(DOCUMENTS, stopwords=["reef"]), "reef") == []
    german = [Document(text="und der Hund"), Document(text="und die Katze")]
    assert len(Bm25Retriever(german, stopwords="de").search("und Hund", 5)) == 1
    with pytest.raises(InputError, match="stopwords: klingon"):
        Bm25Retriever(DOCUMENTS, stopwords="klingon")


@pytest.mark.parametrize("k", [0, -1])
async def test_at_least_one_passage_must_be_asked_for(k: int) -> None:
    with pytest.raises(InputError, match="k is the number of passages"):
        await Bm25Retriever([]).retrieve("reef", k)


async def test_many_searches_at_once_find_what_one_finds() -> None:
    words = [f"word{i}" for i in range(40)]
    draw = np.random.default_rng(0)
    retriever = Bm25Retriever([Document(doc_id=str(i), text=" ".join(draw.choice(words, 12))) for i in range(500)])
    queries = [" ".join(draw.choice(words, 3)) for _ in range(60)]
    together = await asyncio.gather(*(retriever.retrieve(query, 20) for query in queries))
    assert together == [retriever.search(query, 20) for query in queries]
    assert all(len(passages) == 20 for passages in together)


@needs_mtrag
def test_rewritten_questions_find_more_of_mtrag_than_last_turns() -> None:
    queries, corpus = read_queries(QUERIES, [], [])
    assert len(queries) == 777
    rewritten = corpus.recalls([query.row.target["rewritten_question"] for query in queries], queries).mean()
    asked = corpus.recalls([query.row.chat.messages[-1].content for query in queries], queries).mean()
    # bm25s's own top 5 of the same corpus: 0.5534 and 0.5111.
    assert rewritten == pytest.approx(0.5534, abs=0.002)
    assert asked == pytest.approx(0.5111, abs=0.002)
