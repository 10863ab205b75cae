"""Vectors: cosines, exact top k, what an encoder may not give; and the encoder that a package ships."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import sys
import time
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from midstream.errors import InputError, ModelError, RetrievalError
from midstream.retrieval import DenseRetriever, Passage, Retriever, shipped_encoder
from midstream.types import Document

VECTORS = {
    "east": (2.0, 0.0),
    "north": (0.0, 3.0),
    "north-east": (1.0, 1.0),
    "west": (-4.0, 0.0),
    "nowhere": (0.0, 0.0),
}
DOCUMENTS = [Document(doc_id=str(i), text=text) for i, text in enumerate(VECTORS)]


def look_up(texts: Sequence[str]) -> list[tuple[float, ...]]:
    return [VECTORS[text] for text in texts]


def told(passages: Sequence[Passage]) -> list[tuple[str, float]]:
    return [(passage.document.text, pytest.approx(passage.score, abs=1e-6)) for passage in passages]


async def test_scores_are_cosines() -> None:
    retriever = DenseRetriever(DOCUMENTS, look_up)
    assert isinstance(retriever, Retriever)
    expected = [("east", 1.0), ("north-east", 2**-0.5), ("north", 0.0), ("nowhere", 0.0), ("west", -1.0)]
    assert told(await retriever.retrieve("east", 9)) == expected
    assert told(retriever.search("east", 2)) == expected[:2]
    assert retriever.search("nowhere", 3) == [], "a query without a direction"
    assert retriever.search(" ", 3) == DenseRetriever([], look_up).search("east", 3) == []
    with pytest.raises(InputError, match="k is the number"):
        retriever.search("east", 0)


def test_the_best_are_exact_and_equal_ones_in_order() -> None:
    draw = np.random.default_rng(1)
    # Small integers on the axes: their cosines are exact, and many are equal.
    vectors = {str(i): np.eye(8)[draw.integers(8)] * draw.integers(1, 5) for i in range(300)}
    documents = [Document(doc_id=name, text=name) for name in vectors]
    retriever = DenseRetriever(documents, lambda texts: np.stack([vectors[text] for text in texts]))
    for name in ("0", "17"):
        same = [other for other in vectors if vectors[other] @ vectors[name] > 0]
        rest = [other for other in vectors if other not in same]
        for k in (1, 10, 100, 300):
            assert [p.document.doc_id for p in retriever.search(name, k)] == [*same, *rest][:k]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([[1.0]], r"shape \(1, 1\) for 2 texts"),
        ([1.0, 2.0], r"shape \(2,\) for 2 texts"),
        ([[1.0], [float("nan")]], "NaN"),
        ([["a"], ["b"]], "the encoder failed: ValueError"),
    ],
)
def test_what_is_no_matrix_of_numbers_is_refused(given: object, message: str) -> None:
    with pytest.raises(RetrievalError, match=message):
        DenseRetriever(DOCUMENTS[:2], lambda texts: given)


async def test_a_failing_encoder_is_named() -> None:
    retriever = DenseRetriever(DOCUMENTS, look_up)
    with pytest.raises(RetrievalError, match="the encoder failed: KeyError: 'south'") as raised:
        await retriever.retrieve("south", 1)
    assert (raised.value.status, raised.value.code) == (502, "retrieval_failed")
    grows = DenseRetriever(DOCUMENTS, lambda texts: look_up(texts) if len(texts) > 1 else [(0.0, 0.0, 1.0)])
    with pytest.raises(RetrievalError, match="a query has 3 dimensions, documents have 2"):
        grows.search("up", 1)


async def test_the_encoder_is_asked_by_one_thread_at_a_time() -> None:
    inside: list[str] = []
    most: list[int] = []

    def encode(texts: Sequence[str]) -> list[tuple[float, ...]]:
        inside.append("a thread")
        # Long enough for the others to come in, if they could.
        time.sleep(0.002)
        most.append(len(inside))
        inside.pop()
        return look_up(texts)

    retriever = DenseRetriever(DOCUMENTS, encode)
    found = await asyncio.gather(*(retriever.retrieve("north", 1) for _ in range(16)))
    assert {passages[0].document.text for passages in found} == {"north"}
    assert most == [1] * 17


@pytest.mark.skipif(importlib.util.find_spec("wordllama") is None, reason="needs pip install 'midstream[dense]'")
class TestShippedEncoder:
    def test_it_finds_meanings_that_share_no_word(self) -> None:
        texts = ["The vehicle needs fuel.", "Bread is baked from flour.", "A physician treats the sick."]
        retriever = DenseRetriever([Document(text=text) for text in texts], shipped_encoder())
        for query, expected in (("car out of gas", 0), ("doctor for my illness", 2), ("how to make dough", 1)):
            assert retriever.search(query, 1)[0].document.text == texts[expected]
        assert retriever.search("", 1) == []

    def test_its_vectors_depend_on_their_text_alone(self) -> None:
        encode = shipped_encoder()
        texts = [f"sentence number {i} " * (i + 1) for i in range(70)]
        together: NDArray[np.float32] = np.asarray(encode(texts))
        assert together.shape == (70, 256)
        assert together.dtype == np.float32
        np.testing.assert_allclose(together, np.concatenate([np.asarray(encode([text])) for text in texts]), atol=1e-6)

    def test_it_leaves_the_applications_logging_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        root = logging.getLogger()
        monkeypatch.setattr(root, "handlers", [])
        monkeypatch.setattr(root, "level", logging.ERROR)
        for name in [name for name in sys.modules if name.split(".")[0] == "wordllama"]:
            monkeypatch.delitem(sys.modules, name)
        shipped_encoder()
        assert (root.handlers, root.level) == ([], logging.ERROR)


def test_without_its_package_the_encoder_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wordllama", None)
    with pytest.raises(ModelError, match=r"pip install 'midstream\[dense\]'"):
        shipped_encoder()
