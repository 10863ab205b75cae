"""Adapters are kept as they were when they were read, under their digest."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import safe_open

from midstream.adapters import load_adapter
from midstream_vllm import core
from midstream_vllm.ownership import read_kept
from midstream_vllm.store import Base, keep

LIBRARY = Path(__file__).parents[2] / "library" / "smollm2-135m-instruct"


def shapes_of(folder: Path) -> dict[str, tuple[int, int]]:
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        found = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - not a mapping
    modules = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in found}
    path = "base_model.model.{}.lora_{}.weight"
    return {m: (found[path.format(m, "B")][0], found[path.format(m, "A")][1]) for m in modules}


@pytest.fixture(scope="module")
def base() -> Base:
    return Base(shapes_of(LIBRARY / "certainty"), vocab_size=49152, encode=None, max_rank=16)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(LIBRARY / "certainty", tmp_path / "certainty"))


def edit(folder: Path, **fields: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_it_is_kept_under_the_digest_that_midstream_gives_it(folder: Path, base: Base, tmp_path: Path) -> None:
    root = tmp_path / "kept"
    found = keep(folder, "mine", base, root)
    assert base.shapes is not None
    assert found.digest == load_adapter(folder, shapes=base.shapes).digest
    assert read_kept(str(found.path)) == ("alora", found.digest)
    assert found.spec.invocation_tokens == (1, 33622, 198)
    assert [path.name for path in root.iterdir()] == [found.path.name]
    # For vLLM's own loader it is a plain LoRA of the same weights.
    config = json.loads((found.path / "adapter_config.json").read_text())
    assert "alora_invocation_tokens" not in config
    weights = "adapter_model.safetensors"
    assert (found.path / weights).read_bytes() == (folder / weights).read_bytes()


def test_the_same_content_is_the_same_and_another_is_another(folder: Path, base: Base, tmp_path: Path) -> None:
    root = tmp_path / "kept"
    first = keep(folder, "mine", base, root)
    edit(folder, peft_version="another")
    assert keep(folder, "renamed", base, root).path == first.path
    edit(folder, lora_alpha=64)
    second = keep(folder, "mine", base, root)
    assert second.path != first.path
    edit(folder, alora_invocation_tokens=None)
    third = keep(folder, "mine", base, root)
    assert read_kept(str(third.path)) == ("lora", third.digest)
    assert json.loads((first.path / "adapter_config.json").read_text())["lora_alpha"] == 32
    assert len(list(root.iterdir())) == 3


def test_every_violation_is_in_one_message(folder: Path, base: Base, tmp_path: Path) -> None:
    edit(folder, use_dora=True, bias="all", alora_invocation_tokens=[99999], r=32, lora_alpha=3)
    with pytest.raises(core.AdapterFormatError) as refused:
        keep(folder, "mine", base, tmp_path / "kept")
    message = str(refused.value)
    for said in ("use_dora", "bias", "99999", "shape", str(folder)):
        assert said in message
    assert list((tmp_path / "kept").iterdir()) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"target_modules": ["query"]}, "match no linear layer"),
        ({"target_modules": ["q_proj"]}, "have weights but are no target"),
    ],
)
def test_an_adapter_for_other_modules_is_refused(
    folder: Path, base: Base, tmp_path: Path, change: dict[str, object], said: str
) -> None:
    edit(folder, **change)
    for against in (base, replace(base, shapes=None)):
        with pytest.raises(core.AdapterFormatError, match=said):
            keep(folder, "mine", against, tmp_path / "kept")


def test_an_adapter_of_another_base_model_is_refused(folder: Path, base: Base, tmp_path: Path) -> None:
    assert base.shapes is not None
    renamed = {name.replace("model.layers", "model.language_model.layers"): s for name, s in base.shapes.items()}
    with pytest.raises(core.AdapterFormatError, match="are not in this base model"):
        keep(folder, "mine", replace(base, shapes=renamed), tmp_path / "kept")
    wider = {name: (out, inner + 1) for name, (out, inner) in base.shapes.items()}
    with pytest.raises(core.AdapterFormatError, match="this base model and rank need"):
        keep(folder, "mine", replace(base, shapes=wider), tmp_path / "kept")


def test_what_this_vllm_cannot_do_is_refused(folder: Path, base: Base, tmp_path: Path) -> None:
    with pytest.raises(core.AdapterFormatError, match="rank is 16, and vLLM was started with --max-lora-rank 8"):
        keep(folder, "mine", replace(base, max_rank=8), tmp_path / "kept")
    edit(folder, alpha_pattern={"q_proj": 8})
    assert keep(folder, "mine", base, tmp_path / "kept").digest
    with pytest.raises(core.AdapterFormatError, match="differ in rank or scale"):
        keep(folder, "mine", replace(base, patterns=False), tmp_path / "kept")


def test_files_that_are_not_there_are_told(folder: Path, base: Base, tmp_path: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(core.AdapterFormatError, match=r"adapter_model\.bin is a pickle file"):
        keep(folder, "mine", base, tmp_path / "kept")
    with pytest.raises(core.AdapterFormatError, match="it is not a folder"):
        keep(tmp_path / "nowhere", "mine", base, tmp_path / "kept")
