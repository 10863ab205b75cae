"""What the replicas are made of."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import tiny_llama
from tests.scale.replicas import needs_haproxy
from tests.server.running import write_adapters
from tests.tiny import save_tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and its adapters, where there is a router for them."""
    needs_haproxy()
    root = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(root / "tiny")
    save_tiny_tokenizer(root / "tiny")
    write_adapters(root / "adapters")
    return root
