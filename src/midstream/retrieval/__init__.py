"""Finding passages for a question, behind one small protocol."""

from midstream.retrieval.protocol import Passage, Retriever

__all__ = ["Passage", "Retriever"]
