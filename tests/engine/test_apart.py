"""Work outside of the engine's thread leaves no thread behind that could keep an OpenMP team."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from midstream.engine import engine as module
from midstream.engine.apart import apart
from midstream.engine.engine import AsyncEngine
from tests.helpers import make_adapter_folder, tiny_llama
from tests.tiny import save_tiny_tokenizer


def test_the_thread_ends_and_the_result_or_the_error_comes_back() -> None:
    inside = apart(threading.current_thread)
    assert inside is not threading.current_thread()
    assert not inside.is_alive()
    with pytest.raises(ValueError, match="wrong"):
        apart(lambda: int("wrong"))


async def test_models_and_adapters_are_read_in_threads_that_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, threading.Thread] = {}

    def noted(name: str) -> None:
        real = getattr(module, name)

        def call(*args: object, **more: object) -> object:
            seen[name] = threading.current_thread()
            return real(*args, **more)

        monkeypatch.setattr(module, name, call)

    noted("load_model")
    noted("load_adapter")
    model = tiny_llama()
    model.save_pretrained(tmp_path / "tiny")
    save_tiny_tokenizer(tmp_path / "tiny")
    folder = make_adapter_folder(model, tmp_path / "check", invocation=(1, 2))
    engine = AsyncEngine.load(tmp_path / "tiny", dtype="float32")
    await engine.load_adapter(folder)
    await engine.aclose()
    assert seen.keys() == {"load_model", "load_adapter"}
    assert not any(thread.is_alive() for thread in seen.values())
