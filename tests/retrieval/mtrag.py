"""Where MTRAG's corpus and queries are, for the tests that measure how much is found."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("MIDSTREAM_DATA", Path(__file__).parents[3] / "shared" / "data")) / "rag"
QUERIES = FOLDER / "mtrag_retrieval_queries.jsonl"

needs_mtrag = pytest.mark.skipif(
    not QUERIES.exists(),
    reason="needs MTRAG's corpus and queries: set MIDSTREAM_DATA to the folder of rag/mtrag_*.jsonl",
)
