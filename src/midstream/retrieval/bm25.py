"""BM25 over documents in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import bm25s
import numpy as np
from numpy.typing import NDArray

from midstream.errors import InputError
from midstream.retrieval.protocol import Passage
from midstream.retrieval.ranking import best, check_k, searched_text
from midstream.types import Document


class Bm25Retriever:
    """Finds the documents whose title or text shares words with a query (bm25s, its defaults).

    `stopwords` are the words that count for nothing: a language bm25s knows ("en", "de", ...) or the words themselves.
    A document without a word of the query is not found. Equal scores keep the order of the documents, and doc_ids
    need not differ. The index is made here and only read later, so that threads may share it. Raises InputError for
    an unknown language.
    """

    def __init__(self, documents: Sequence[Document], *, stopwords: str | Sequence[str] = "en") -> None:
        self._documents = tuple(documents)
        self._stopwords = stopwords if isinstance(stopwords, str) else list(stopwords)
        words = self._words([searched_text(document) for document in self._documents])
        # bm25s cannot index a corpus without words.
        self._index = bm25s.BM25() if any(words) else None
        if self._index is not None:
            self._index.index(words, show_progress=False)

    async def retrieve(self, query: str, k: int) -> list[Passage]:
        """At most `k` passages, best first; BM25 scores, all above 0. Raises InputError for k < 1."""
        return await asyncio.to_thread(self.search, query, k)

    def search(self, query: str, k: int) -> list[Passage]:
        """`retrieve` without an event loop."""
        check_k(k)
        scores = self._scores(query)
        found = np.flatnonzero(scores > 0)
        return [Passage(self._documents[i], float(scores[i])) for i in found[best(scores[found], k)]]

    def _scores(self, query: str) -> NDArray[np.float32]:
        (words,) = self._words([query])
        if self._index is None or not words:
            return np.zeros(len(self._documents), dtype=np.float32)
        return self._index.get_scores(words)

    def _words(self, texts: list[str]) -> list[list[str]]:
        try:
            return bm25s.tokenize(texts, stopwords=self._stopwords, return_ids=False, show_progress=False)
        except ValueError as error:
            raise InputError(f"stopwords: {error}") from error
