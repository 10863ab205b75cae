"""What a flow knows of retrieval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from midstream.types import Document


@dataclass(frozen=True, slots=True)
class Passage:
    """A document that was found, and its score: higher is better, comparable within one retrieval only."""

    document: Document
    score: float

    def as_dict(self) -> dict[str, Any]:
        return {**self.document.model_dump(), "score": self.score}


@runtime_checkable
class Retriever(Protocol):
    """Something that finds passages."""

    async def retrieve(self, query: str, k: int) -> Sequence[Passage]:
        """At most `k` passages for a query, best first. Fewer where fewer match. Raises RetrievalError."""
        ...
