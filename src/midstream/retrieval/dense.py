"""Search by the direction of vectors, over documents in memory."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from midstream.errors import RetrievalError
from midstream.retrieval.protocol import Passage
from midstream.retrieval.ranking import best, check_k, searched_text
from midstream.types import Document

Encode = Callable[[Sequence[str]], ArrayLike]


class DenseRetriever:
    """Finds the documents whose vectors point most nearly where the query's does: cosine, every document compared.

    `encode` takes n texts and gives their vectors, [n, dim]; it is called with all documents here and with each
    query later, by one thread at a time. A text whose vector is zero has no direction: such a query finds nothing, such
    a document has the score 0. Raises RetrievalError where `encode` fails or gives something else.
    """

    def __init__(self, documents: Sequence[Document], encode: Encode) -> None:
        self._documents = tuple(documents)
        self._encode = encode
        self._one_at_a_time = threading.Lock()
        texts = [searched_text(document) for document in self._documents]
        self._vectors = self._directions(texts) if texts else None

    async def retrieve(self, query: str, k: int) -> list[Passage]:
        """At most `k` passages, best first; cosines, from -1 to 1. Raises InputError for k < 1, RetrievalError."""
        return await asyncio.to_thread(self.search, query, k)

    def search(self, query: str, k: int) -> list[Passage]:
        """`retrieve` without an event loop."""
        check_k(k)
        if self._vectors is None or not query.strip():
            return []
        (direction,) = self._directions([query])
        if direction.shape != self._vectors.shape[1:]:
            raise RetrievalError(f"a query has {len(direction)} dimensions, documents have {self._vectors.shape[1]}")
        if not direction.any():
            return []
        scores = self._vectors @ direction
        return [Passage(self._documents[i], float(scores[i])) for i in best(scores, k)]

    def _directions(self, texts: list[str]) -> NDArray[np.float32]:
        """Vectors of length 1 (or 0), [texts, dim]."""
        try:
            with self._one_at_a_time:
                vectors = np.asarray(self._encode(texts), dtype=np.float32)
        except Exception as error:
            raise RetrievalError(f"the encoder failed: {type(error).__name__}: {error}") from error
        if vectors.ndim != 2 or len(vectors) != len(texts):
            raise RetrievalError(f"the encoder gave the shape {vectors.shape} for {len(texts)} texts, not [texts, dim]")
        if not np.isfinite(vectors).all():
            raise RetrievalError("the encoder gave vectors with infinite numbers or NaN")
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        return np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 0)
