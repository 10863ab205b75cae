"""Retrievers of LangChain and LlamaIndex: the libraries themselves, and what goes wrong with them."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from midstream.errors import InputError, RetrievalError
from midstream.retrieval import LangChainRetriever, LlamaIndexRetriever, Passage, Retriever
from midstream.types import Document

langchain = pytest.importorskip("langchain_core.retrievers", reason="needs pip install 'midstream[clients]'")
llama_index = pytest.importorskip("llama_index.core.retrievers", reason="needs pip install 'midstream[clients]'")

from langchain_core.documents import Document as LangChainDocument  # noqa: E402
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode  # noqa: E402


class LangChainFixed(langchain.BaseRetriever):
    found: list[Any]

    def _get_relevant_documents(self, query: str, *, run_manager: Any) -> list[LangChainDocument]:
        return [document for document in self.found if query in document.page_content]


class LangChainBroken(langchain.BaseRetriever):
    def _get_relevant_documents(self, query: str, *, run_manager: Any) -> list[LangChainDocument]:
        raise ConnectionError("no vector store")


class LlamaIndexFixed(llama_index.BaseRetriever):
    def __init__(self, *found: NodeWithScore) -> None:
        super().__init__()
        self.found = list(found)

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return [node for node in self.found if query_bundle.query_str in node.text]


class LlamaIndexBroken(llama_index.BaseRetriever):
    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        raise TimeoutError("too slow")


async def test_langchains_documents_become_passages() -> None:
    found = [
        LangChainDocument("x one", metadata={"doc_id": 7, "title": "One", "source": "s"}, id="unused"),
        LangChainDocument("x two", metadata={"source": "two.md"}, id="two"),
        LangChainDocument("x three", metadata={"source": "three.md", "title": None}),
        LangChainDocument("x four"),
        LangChainDocument("other"),
    ]
    retriever = LangChainRetriever(LangChainFixed(found=found))
    assert isinstance(retriever, Retriever)
    passages = await retriever.retrieve("x", 9)
    assert passages == [
        Passage(Document(text="x one", doc_id="7", title="One"), 1.0),
        Passage(Document(text="x two", doc_id="two"), 1 / 2),
        Passage(Document(text="x three", doc_id="three.md"), 1 / 3),
        Passage(Document(text="x four"), 1 / 4),
    ]
    assert await retriever.retrieve("x", 2) == passages[:2]
    assert await retriever.retrieve("nothing like it", 2) == []


async def test_llama_indexes_nodes_become_passages() -> None:
    nodes = [
        TextNode(text="x one", metadata={"doc_id": "1", "title": "One"}),
        TextNode(text="x two", id_="node-2"),
        TextNode(text="other"),
    ]
    scored = [NodeWithScore(node=node, score=score) for node, score in zip(nodes, (0.9, 0.4, 0.1), strict=True)]
    retriever = LlamaIndexRetriever(LlamaIndexFixed(*scored))
    assert isinstance(retriever, Retriever)
    passages = await retriever.retrieve("x", 9)
    assert passages == [
        Passage(Document(text="x one", doc_id="1", title="One"), 0.9),
        Passage(Document(text="x two", doc_id="node-2"), 0.4),
    ]
    assert await retriever.retrieve("x", 1) == passages[:1]
    unscored = LlamaIndexRetriever(LlamaIndexFixed(scored[0], NodeWithScore(node=nodes[1])))
    assert [passage.score for passage in await unscored.retrieve("x", 2)] == [1.0, 0.5]


async def test_what_they_raise_is_named() -> None:
    for retriever, message in (
        (LangChainRetriever(LangChainBroken()), "LangChainBroken failed: ConnectionError: no vector store"),
        (LlamaIndexRetriever(LlamaIndexBroken()), "LlamaIndexBroken failed: TimeoutError: too slow"),
    ):
        with pytest.raises(RetrievalError, match=message) as raised:
            await retriever.retrieve("x", 1)
        assert (raised.value.status, raised.value.code) == (502, "retrieval_failed")
        assert isinstance(raised.value.__cause__, (ConnectionError, TimeoutError))
        with pytest.raises(InputError, match="k is the number"):
            await retriever.retrieve("x", 0)


async def test_what_is_no_list_of_documents_is_named() -> None:
    async def nothing(query: str) -> None:
        return None

    async def texts(query: str) -> list[str]:
        return ["a text"]

    for wrong, message in ((nothing, "NoneType"), (texts, "'str' object has no attribute")):
        with pytest.raises(RetrievalError, match=message):
            await LangChainRetriever(SimpleNamespace(ainvoke=wrong)).retrieve("x", 1)
        with pytest.raises(RetrievalError, match=message):
            await LlamaIndexRetriever(SimpleNamespace(aretrieve=wrong)).retrieve("x", 1)
    with pytest.raises(InputError, match="has a method ainvoke: LlamaIndexFixed has none"):
        LangChainRetriever(LlamaIndexFixed())
    with pytest.raises(InputError, match="has a method aretrieve: LangChainFixed has none"):
        LlamaIndexRetriever(LangChainFixed(found=[]))


async def test_cancelling_is_no_failure() -> None:
    async def forever(query: str) -> list[Any]:
        await asyncio.Event().wait()
        return []

    task = asyncio.create_task(LangChainRetriever(SimpleNamespace(ainvoke=forever)).retrieve("x", 1))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
