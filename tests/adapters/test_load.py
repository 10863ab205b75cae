"""Adapter folders made by PEFT itself, and folders with something wrong."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from midstream.adapters import load_adapter
from midstream.errors import AdapterFormatError
from tests.helpers import SEVEN, make_adapter_folder, tiny_llama
from tests.reference import peft_model

MODEL = tiny_llama()
SHAPES = {
    path: (module.out_features, module.in_features)
    for path, module in MODEL.named_modules()
    if isinstance(module, nn.Linear) and path != "lm_head"
}


def load(folder: Path, **options: Any) -> Any:
    return load_adapter(folder, shapes=SHAPES, vocab_size=320, **options)


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "settings",
    [
        {"targets": SEVEN},
        {"targets": ("o_proj",)},
        {"targets": r".*layers\.1\..*(q_proj|up_proj)"},
        {"targets": "all-linear"},
        {"targets": SEVEN, "use_rslora": True, "rank": 6},
        {
            "targets": SEVEN,
            "rank_pattern": {"q_proj": 2, "layers.0.mlp.up_proj": 9},
            "alpha_pattern": {"v_proj": 3},
        },
        {"targets": SEVEN, "layers_to_transform": [1]},
        {"targets": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
        {"targets": SEVEN, "invocation": (3, 4)},
    ],
)
def test_targets_ranks_and_scales_are_pefts(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = make_adapter_folder(MODEL, tmp_path / "a", **settings)
    adapter = load(folder)
    layers = {
        path.removeprefix("base_model.model."): module
        for path, module in peft_model(MODEL, {"a": folder}).named_modules()
        if hasattr(module, "lora_A") and "a" in module.lora_A
    }
    assert set(adapter.weights) == set(layers)
    for path, layer in layers.items():
        weights = adapter.weights[path]
        assert weights.scale == pytest.approx(layer.scaling["a"])
        assert torch.equal(weights.a, layer.lora_A["a"].weight)
        assert torch.equal(weights.b, layer.lora_B["a"].weight)


def test_the_older_text_form_is_tokenized_and_shown(tmp_path: Path) -> None:
    folder = make_adapter_folder(MODEL, tmp_path / "a")
    edit(folder, invocation_string="<go>")
    adapter = load(folder, encode=lambda text: [ord(c) for c in text])
    assert adapter.spec.kind == "alora"
    assert adapter.spec.invocation_tokens == (60, 103, 111, 62)
    assert adapter.spec.invocation_text == "<go>"
    with pytest.raises(AdapterFormatError, match="tokenizer"):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"target_parameters": ["experts"]}, "target_parameters"),
        ({"something_new": 3}, "something_new"),
        ({"peft_type": "IA3"}, "peft_type"),
        ({"task_type": "SEQ_CLS"}, "task_type"),
        ({"r": 0}, "r is 0"),
        ({"r": "8"}, "not a positive whole number"),
        ({"r": 5}, "has shape"),
        ({"lora_alpha": float("inf")}, "lora_alpha"),
        ({"target_modules": ["query"]}, "match no linear layer"),
        ({"target_modules": ["q_proj"]}, "are no target"),
        ({"target_modules": list(SEVEN)}, "tensors are missing"),
        ({"target_modules": "(["}, "not a regular expression"),
        ({"alora_invocation_tokens": []}, "alora_invocation_tokens"),
        ({"alora_invocation_tokens": [1, 999]}, "outside this base model's vocabulary"),
        ({"alora_invocation_tokens": "go"}, "not a list"),
    ],
)
def test_what_would_change_the_result_is_refused(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    folder = make_adapter_folder(MODEL, tmp_path / "a")
    edit(folder, **changes)
    with pytest.raises(AdapterFormatError, match=reason.replace("(", r"\(")):
        load(folder)


def test_all_violations_come_in_one_error(tmp_path: Path) -> None:
    folder = make_adapter_folder(MODEL, tmp_path / "a")
    edit(folder, use_dora=True, bias="all")
    weights = load_file(folder / "adapter_model.safetensors")
    names = sorted(weights)
    del weights[names[0]]
    weights[names[1]][0, 0] = float("nan")
    weights["base_model.model.model.layers.9.mlp.up_proj.lora_A.weight"] = torch.zeros(4, 32)
    save_file(weights, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterFormatError) as caught:
        load(folder)
    text = str(caught.value)
    for part in ("use_dora", "bias", "missing", "NaN", "not in this base model"):
        assert part in text
    assert len(caught.value.violations) >= 5


def test_a_pickle_is_refused_by_name_and_never_opened(tmp_path: Path) -> None:
    folder = make_adapter_folder(MODEL, tmp_path / "a")
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"not even a pickle")
    with pytest.raises(AdapterFormatError, match=r"adapter_model.bin is a pickle"):
        load(folder)


def test_the_digest_follows_content_and_not_names(tmp_path: Path) -> None:
    folder = make_adapter_folder(MODEL, tmp_path / "a", invocation=(3,))
    first = load(folder)
    copied = Path(shutil.copytree(folder, tmp_path / "elsewhere"))
    assert load(copied, name="other").digest == first.digest
    edit(copied, alora_invocation_tokens=[4])
    assert load(copied).digest != first.digest
    weights = load_file(folder / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] += 1e-3
    save_file(weights, folder / "adapter_model.safetensors")
    assert load(folder).digest != first.digest


def damage(folder: Path, rng: random.Random) -> None:
    """One random injury."""
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    kind = rng.randrange(8)
    if kind in (0, 1):
        target = rng.choice([config, weights])
        data = bytearray(target.read_bytes())
        for _ in range(rng.randrange(1, 6)):
            data[rng.randrange(min(len(data), 4000))] = rng.randrange(256)
        target.write_bytes(bytes(data))
    elif kind == 2:
        target = rng.choice([config, weights])
        target.write_bytes(target.read_bytes()[: rng.randrange(target.stat().st_size)])
    elif kind in (3, 4):
        content = json.loads(config.read_text())
        junk = [None, -1, 0, "x", [], {}, [1, "a"], {"q_proj": "x"}, True, 1e300, [[]], {"(": 2}]
        content[rng.choice([*content, "midstream_unknown"])] = rng.choice(junk)
        config.write_text(json.dumps(content))
    elif kind == 5:
        rng.choice([config, weights]).unlink()
    else:
        tensors = load_file(weights)
        name = rng.choice(sorted(tensors))
        tensor = tensors.pop(name)
        changed = rng.choice(
            [
                None,
                tensor[:, :-1].contiguous(),
                tensor.to(torch.int32),
                tensor.flatten(),
                tensor * float("inf"),
                tensor[:0],
            ]
        )
        if changed is not None:
            tensors[rng.choice([name, name + "x", name.replace("layers.0", "layers.7")])] = changed
        save_file(tensors, weights)


def test_500_damaged_folders_give_the_typed_error_only(tmp_path: Path) -> None:
    good = make_adapter_folder(MODEL, tmp_path / "good", invocation=(3, 4))
    rng = random.Random(11)
    refused = 0
    for _ in range(500):
        folder = Path(shutil.copytree(good, tmp_path / "damaged", dirs_exist_ok=True))
        damage(folder, rng)
        try:
            load(folder, encode=lambda text: [1])
        except AdapterFormatError as error:
            refused += bool(error.violations)
        shutil.rmtree(folder)
    assert refused > 300
