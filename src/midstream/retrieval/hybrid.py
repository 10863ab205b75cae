"""Several retrievers as one."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from midstream.errors import InputError
from midstream.retrieval.protocol import Passage, Retriever
from midstream.retrieval.ranking import check_k
from midstream.types import Document

# The constant of the paper: how little the first ranks of one list count against agreement between the lists.
_K = 60


class HybridRetriever:
    """Reciprocal rank fusion: a document's score is the sum over the retrievers of 1 / (60 + its rank).

    Scores of different retrievers cannot be compared, ranks can. G. V. Cormack, C. L. A. Clarke, S. Büttcher:
    "Reciprocal Rank Fusion outperforms Condorcet and individual Rank Learning Methods", SIGIR 2009.

    Each retriever is asked for `depth` passages (or k, if that is more), all at the same time. Documents are the same
    when they are equal in every field. Raises InputError without retrievers or depth.
    """

    def __init__(self, retrievers: Sequence[Retriever], *, depth: int = 100) -> None:
        if not retrievers:
            raise InputError("a hybrid of no retrievers finds nothing: give at least one")
        check_k(depth)
        self._retrievers = tuple(retrievers)
        self._depth = depth

    async def retrieve(self, query: str, k: int) -> list[Passage]:
        """At most `k` passages, best first. Raises InputError for k < 1, and what the retrievers raise."""
        check_k(k)
        depth = max(k, self._depth)
        lists = await asyncio.gather(*(retriever.retrieve(query, depth) for retriever in self._retrievers))
        scores = _fused(lists)
        # sorted keeps the order of equal ones: that of the retrievers, then that of their lists.
        return [Passage(document, scores[document]) for document in sorted(scores, key=lambda d: -scores[d])[:k]]


def _fused(lists: Sequence[Sequence[Passage]]) -> dict[Document, float]:
    scores: dict[Document, float] = {}
    for passages in lists:
        # A list that names a document twice does not vote twice.
        ranked = dict.fromkeys(passage.document for passage in passages)
        for rank, document in enumerate(ranked, 1):
            scores[document] = scores.get(document, 0.0) + 1 / (_K + rank)
    return scores
