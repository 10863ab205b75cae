"""The weights file: what is copied, what is compared, and what a damaged one gives."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from midstream.adapters import Adapter, load_adapter
from midstream.errors import AdapterFormatError

MODULES = [f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in ("q_proj", "v_proj")]
SHAPES = dict.fromkeys(MODULES, (6, 8))
CONFIG = {"peft_type": "LORA", "target_modules": ["q_proj", "v_proj"], "r": 2, "lora_alpha": 4}
FILE = "adapter_model.safetensors"


def name_of(module: str, side: str) -> str:
    return f"base_model.model.{module}.lora_{side}.weight"


def weights(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    sides = {"A": (2, 8), "B": (6, 2)}
    return {name_of(m, side): torch.randn(shape).to(dtype) for m in MODULES for side, shape in sides.items()}


def write(folder: Path, tensors: dict[str, Tensor] | None = None, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    save_file(weights() if tensors is None else tensors, folder / FILE)
    return folder


def load(folder: Path, **options: Any) -> Adapter:
    return load_adapter(folder, **{"shapes": SHAPES, **options})


def violations(folder: Path, **options: Any) -> tuple[str, ...]:
    with pytest.raises(AdapterFormatError) as caught:
        load(folder, **options)
    return caught.value.violations


def test_a_loaded_adapter_does_not_change_when_its_file_is_edited_in_place(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    adapter = load(folder)
    before = {module: (w.a.clone(), w.b.clone()) for module, w in adapter.weights.items()}
    path = folder / FILE
    size = path.stat().st_size
    save_file(weights(seed=1), folder / "other")
    with path.open("r+b") as file:
        file.write((folder / "other").read_bytes())
    assert path.stat().st_size == size
    for module, (a, b) in before.items():
        assert torch.equal(adapter.weights[module].a, a)
        assert torch.equal(adapter.weights[module].b, b)
    again = load(folder)
    assert again.digest != adapter.digest
    with path.open("r+b") as file:
        file.truncate(10)
    assert torch.equal(adapter.weights[MODULES[0]].a, before[MODULES[0]][0])
    assert "truncated or damaged" in violations(folder)[0]


def test_the_digest_ignores_names_and_order_but_no_setting_that_counts(tmp_path: Path) -> None:
    digest = load(write(tmp_path / "a")).digest
    renamed = {name.replace(".weight", ".default.weight"): t for name, t in reversed(weights().items())}
    same = {"target_modules": ["v_proj", "q_proj"], "lora_dropout": 0.5, "base_model_name_or_path": "x"}
    assert load(write(tmp_path / "b", renamed, **same), name="other").digest == digest
    # The same rank and scale in another way of writing them.
    assert load(write(tmp_path / "c", lora_alpha=1, alpha_pattern={".*": 4})).digest == digest
    others = [{"lora_alpha": 5}, {"use_rslora": True}, {"alora_invocation_tokens": [1]}]
    digests = {load(write(tmp_path / "d", **other)).digest for other in others}
    assert len(digests | {digest}) == 4


def test_size_rank_and_types(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", weights(dtype=torch.bfloat16))
    adapter = load(folder)
    numbers = 4 * (2 * 8 + 6 * 2)
    assert (adapter.rank, adapter.size_bytes, adapter.spec.name) == (2, 2 * numbers, "a")
    assert adapter.weights[MODULES[0]].a.dtype == torch.bfloat16
    wide = load(folder, dtype=torch.float32)
    assert wide.size_bytes == 4 * numbers
    assert wide.digest == adapter.digest


def test_weights_that_overflow_the_engines_type_are_refused(tmp_path: Path) -> None:
    tensors = weights()
    tensors[name_of(MODULES[1], "B")][0, 0] = 1e6
    folder = write(tmp_path / "a", tensors)
    load(folder)
    assert violations(folder, dtype=torch.float16) == (f"{MODULES[1]}.lora_B has NaN or infinite values as float16",)


def test_an_adapter_of_another_base_model_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    wider = dict.fromkeys(MODULES, (6, 16))
    assert sum("[2, 8], this base model and rank need [2, 16]" in v for v in violations(folder, shapes=wider)) == 4
    elsewhere = {module.replace("model.", "backbone."): (6, 8) for module in MODULES}
    found = violations(folder, shapes=elsewhere)
    assert any("4 modules are not in this base model, among them model.layers.0" in v for v in found)
    none = violations(folder, shapes={"decoder.wq": (6, 8)})
    assert any("match no linear layer" in v for v in none)
    assert any("4 modules are not in this base model" in v for v in none)


def test_tensors_twice_of_another_kind_or_of_another_type_are_each_named(tmp_path: Path) -> None:
    tensors = weights()
    first, second = name_of(MODULES[0], "A"), name_of(MODULES[1], "A")
    tensors[first.replace(".weight", ".default.weight")] = tensors[first].clone()
    tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = torch.zeros(2, 9)
    tensors[second] = tensors[second].double()
    text = "\n".join(violations(write(tmp_path / "a", tensors, use_dora=True)))
    for part in ("is there twice", "lora_embedding_A is not a LoRA weight", "type F64", "use_dora"):
        assert part in text


def test_config_violations_come_with_those_of_the_weights_file(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    (folder / "adapter_config.json").write_text("{")
    (folder / FILE).write_bytes(b"short")
    found = violations(folder)
    assert len(found) == 2
    assert "adapter_config.json" in found[0]
    assert FILE in found[1]


def test_many_problems_are_counted_and_not_all_listed(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", {f"odd.{i}": torch.zeros(1) for i in range(40)})
    found = violations(folder)
    assert len(found) == 21
    assert found[-1] == "and 21 more of adapter_model.safetensors"


@pytest.mark.parametrize("suffix", ["bin", "pt", "pth", "pkl"])
def test_pickles_are_refused_by_name(suffix: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    (folder / FILE).rename(folder / f"adapter_model.{suffix}")
    assert violations(folder)[0].startswith(f"adapter_model.{suffix} is a pickle file")


@pytest.mark.parametrize("kind", ["missing", "a file", "a loop", "too long", "a null byte", "empty"])
def test_what_is_no_adapter_folder_gives_the_typed_error(kind: str, tmp_path: Path) -> None:
    path = {"too long": tmp_path / ("x" * 5000), "a null byte": tmp_path / "a\0b"}.get(kind, tmp_path / "a")
    if kind == "a file":
        path.write_text("")
    elif kind == "a loop":
        path.symlink_to(path)
    elif kind == "empty":
        path.mkdir()
    assert violations(path)


@pytest.mark.parametrize("file", ["adapter_config.json", "midstream.json", FILE])
def test_a_folder_in_place_of_a_file_gives_the_typed_error(file: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    (folder / file).unlink(missing_ok=True)
    (folder / file).mkdir()
    assert file in violations(folder)[0]


def rewrite_header(path: Path, rng: random.Random) -> None:
    """One random change to the header of a safetensors file, whose length then still fits."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    entry = header[rng.choice(sorted(header))]
    junk: list[Any] = [None, -1, 0, 2**63, 2**70, 1.5, "F32", "F8_E4M3", "BOOL", "C64", [], [0, 0], [2**62, 4], {}]
    entry[rng.choice(["dtype", "shape", "data_offsets", "more"])] = rng.choice(junk)
    if rng.random() < 0.3:
        header["__metadata__"] = rng.choice([None, [], {"a": 1}, {"a": "b"}])
    written = json.dumps(header).encode()
    claimed = rng.choice([len(written)] * 4 + [0, 2**63, len(written) + 1, len(written) - 1])
    path.write_bytes(struct.pack("<Q", claimed) + written + data[8 + length :])


def test_damaged_headers_give_the_typed_error_or_the_same_weights(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    digest = load(folder).digest
    good = (folder / FILE).read_bytes()
    rng = random.Random(3)
    refused = 0
    for _ in range(300):
        (folder / FILE).write_bytes(good)
        rewrite_header(folder / FILE, rng)
        try:
            assert load(folder).digest == digest
        except AdapterFormatError as error:
            refused += bool(error.violations)
    assert refused > 150


def test_damaged_sidecars_and_configs_give_the_typed_error_only(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    sidecar = {"format": 1, "invocation_text": "go", "reads": "user"}
    junk: list[Any] = [None, -1, 1e300, "x", "\ud800", [], {}, [[]], {"(": 2}, {"q_proj": []}, [None], True]
    fields = [
        "r",
        "lora_alpha",
        "target_modules",
        "exclude_modules",
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
        "layers_to_transform",
        "layers_pattern",
        "alora_invocation_tokens",
        "invocation_string",
        "peft_type",
        "bias",
        "init_lora_weights",
        "odd",
    ]
    rng = random.Random(5)
    refused = 0
    for _ in range(300):
        changes = {rng.choice(fields): rng.choice(junk) for _ in range(rng.randrange(1, 4))}
        (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **changes}))
        damaged = {**sidecar, rng.choice([*sidecar, "odd"]): rng.choice([*junk, "go", 1])}
        (folder / "midstream.json").write_text(json.dumps(damaged))
        try:
            load(folder, encode=lambda text: [len(text.encode())])
        except AdapterFormatError as error:
            str(error).encode()
            refused += bool(error.violations)
    assert refused > 200


def test_weights_survive_a_round_trip_exactly(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    adapter = load(folder)
    saved = load_file(folder / FILE)
    for module, loaded in adapter.weights.items():
        assert torch.equal(loaded.a, saved[name_of(module, "A")])
        assert torch.equal(loaded.b, saved[name_of(module, "B")])
        assert loaded.scale == 2.0
