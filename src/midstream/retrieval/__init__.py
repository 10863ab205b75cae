"""Finding passages for a question, behind one small protocol."""

from midstream.retrieval.bm25 import Bm25Retriever
from midstream.retrieval.bridges import LangChainRetriever, LlamaIndexRetriever
from midstream.retrieval.dense import DenseRetriever, Encode
from midstream.retrieval.encoder import shipped_encoder
from midstream.retrieval.folder import read_corpus, read_documents, read_folder
from midstream.retrieval.hybrid import HybridRetriever
from midstream.retrieval.protocol import Passage, Retriever

__all__ = [
    "Bm25Retriever",
    "DenseRetriever",
    "Encode",
    "HybridRetriever",
    "LangChainRetriever",
    "LlamaIndexRetriever",
    "Passage",
    "Retriever",
    "read_corpus",
    "read_documents",
    "read_folder",
    "shipped_encoder",
]
