"""Retrievers of other libraries, as ours. They are known by their methods alone: neither library is imported."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from midstream.errors import InputError, RetrievalError
from midstream.retrieval.protocol import Passage
from midstream.retrieval.ranking import check_k
from midstream.types import Document

if TYPE_CHECKING:
    from langchain_core.retrievers import BaseRetriever as LangChainBase
    from llama_index.core.base.base_retriever import BaseRetriever as LlamaIndexBase


class LangChainRetriever:
    """A LangChain retriever: whatever has `ainvoke(query)` and gives documents, best first.

    It decides how many it finds (its `search_kwargs`); they are cut to k. LangChain gives no scores, so a
    passage's is 1 / rank. `title` is taken from the metadata; the doc_id from the metadata's `doc_id`, the document's
    `id`, or the metadata's `source`. Raises InputError where there is no `ainvoke`.
    """

    def __init__(self, retriever: LangChainBase) -> None:
        _check(retriever, "ainvoke", "LangChain")
        self._retriever = retriever

    async def retrieve(self, query: str, k: int) -> list[Passage]:
        """At most `k` passages, best first. Raises InputError for k < 1, RetrievalError for whatever goes wrong."""
        check_k(k)
        try:
            documents = _langchain(await self._retriever.ainvoke(query))
        except Exception as error:
            raise _failure("LangChain", self._retriever, error) from error
        return _ranked(documents)[:k]


class LlamaIndexRetriever:
    """A LlamaIndex retriever: whatever has `aretrieve(query)` and gives nodes with scores, best first.

    It decides how many it finds (its `similarity_top_k`); they are cut to k. Where a node has no score, those of all
    are 1 / rank. `title` is taken from the metadata; the doc_id from the metadata's `doc_id`, or the node's own id.
    Raises InputError where there is no `aretrieve`.
    """

    def __init__(self, retriever: LlamaIndexBase) -> None:
        _check(retriever, "aretrieve", "LlamaIndex")
        self._retriever = retriever

    async def retrieve(self, query: str, k: int) -> list[Passage]:
        """At most `k` passages, best first. Raises InputError for k < 1, RetrievalError for whatever goes wrong."""
        check_k(k)
        try:
            return _llama_index(await self._retriever.aretrieve(query))[:k]
        except Exception as error:
            raise _failure("LlamaIndex", self._retriever, error) from error


def _langchain(found: Iterable[Any]) -> list[Document]:
    return [
        _document(item.page_content, item.metadata, item.metadata.get("doc_id"), item.id, item.metadata.get("source"))
        for item in found
    ]


def _llama_index(found: Sequence[Any]) -> list[Passage]:
    documents = [
        _document(item.node.get_content(), item.node.metadata, item.node.metadata.get("doc_id"), item.node.node_id)
        for item in found
    ]
    if any(item.score is None for item in found):
        return _ranked(documents)
    return [Passage(document, float(item.score)) for document, item in zip(documents, found, strict=True)]


def _document(text: str, metadata: Mapping[str, Any], *ids: Any) -> Document:
    """The first of `ids` that is there is the doc_id."""
    doc_id = next((str(value) for value in ids if value not in (None, "")), "")
    return Document(text=text, doc_id=doc_id, title=str(metadata.get("title") or ""))


def _ranked(documents: Sequence[Document]) -> list[Passage]:
    return [Passage(document, 1 / rank) for rank, document in enumerate(documents, 1)]


def _check(retriever: Any, method: str, library: str) -> None:
    if not callable(getattr(retriever, method, None)):
        raise InputError(f"a {library} retriever has a method {method}: {type(retriever).__name__} has none")


def _failure(library: str, retriever: Any, error: Exception) -> RetrievalError:
    cause = f"{type(error).__name__}: {error}"
    return RetrievalError(f"the {library} retriever {type(retriever).__name__} failed: {cause}")
