"""Retrievers for the tests of flows."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from midstream.retrieval import Passage
from midstream.types import Document

LIZARD = Document(title="Lighthouses", text="The Lizard lighthouse was lit in 1752.", doc_id="a")
EDDYSTONE = Document(title="Lighthouses", text="The Eddystone lighthouse was lit in 1698.", doc_id="b")


class Shelf:
    """Gives what it was made with, whatever `k` is; or what a function makes of the query. Keeps the queries."""

    def __init__(self, *documents: Document, of: Callable[[str], Sequence[Document]] | None = None) -> None:
        self.documents = documents
        self.of = of
        self.queries: list[tuple[str, int]] = []

    async def retrieve(self, query: str, k: int) -> Sequence[Passage]:
        self.queries.append((query, k))
        await asyncio.sleep(0)
        found = self.documents if self.of is None else self.of(query)
        return [Passage(document, 1.0 / rank) for rank, document in enumerate(found, 1)]


class Odd:
    """Raises what it is given, or gives it."""

    def __init__(self, what: Any) -> None:
        self.what = what

    async def retrieve(self, query: str, k: int) -> Any:
        await asyncio.sleep(0)
        if isinstance(self.what, BaseException):
            raise self.what
        return self.what
