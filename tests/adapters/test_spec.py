"""The configuration and the sidecar, without weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from midstream.adapters import AdapterSpec, parse_config

SHAPES = {f"model.layers.{i}.self_attn.q_proj": (8, 8) for i in range(2)}
PLAIN = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "target_modules": ["q_proj"], "r": 4, "lora_alpha": 8}


def parse(
    folder: Path, config: Any = None, sidecar: Any = None, **options: Any
) -> tuple[AdapterSpec | None, list[str]]:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({**PLAIN, **(config or {})}))
    if sidecar is not None:
        (folder / "midstream.json").write_text(json.dumps(sidecar))
    return parse_config(folder, shapes=SHAPES, name="a", vocab_size=100, **options)


def good(*args: Any, **options: Any) -> AdapterSpec:
    spec, violations = parse(*args, **options)
    assert spec is not None
    assert violations == []
    return spec


def letters(text: str) -> list[int]:
    return [ord(letter) - 60 for letter in text]


def test_a_plain_lora_keeps_the_sidecars_text_and_has_no_invocation_tokens(tmp_path: Path) -> None:
    spec = good(tmp_path, sidecar={"format": 1, "invocation_text": "Certain?", "reads": "assistant"})
    assert (spec.kind, spec.invocation_tokens) == ("lora", ())
    assert (spec.invocation_text, spec.reads) == ("Certain?", "assistant")


def test_token_ids_win_over_the_older_text_which_is_shown(tmp_path: Path) -> None:
    def never(text: str) -> list[int]:
        raise AssertionError(text)

    spec = good(tmp_path, {"alora_invocation_tokens": [7, 8], "invocation_string": "<go>"}, encode=never)
    assert spec.kind == "alora"
    assert spec.invocation_tokens == (7, 8)
    assert spec.invocation_text == "<go>"


def test_where_an_adapter_comes_from_is_told(tmp_path: Path) -> None:
    spec = good(tmp_path, {"base_model_name_or_path": "some/model", "revision": None, "peft_version": "0.21.0"})
    assert dict(spec.metadata) == {"base_model_name_or_path": "some/model", "peft_version": "0.21.0"}


@pytest.mark.parametrize("field", ["eva_config", "corda_config", "loftq_config", "lora_ga_config"])
def test_settings_of_the_start_alone_are_harmless(field: str, tmp_path: Path) -> None:
    good(tmp_path, {field: {"anything": 1}})


@pytest.mark.parametrize("start", [True, False, None, "gaussian", "eva", "orthogonal"])
def test_starts_that_leave_the_base_model_alone_are_accepted(start: Any, tmp_path: Path) -> None:
    good(tmp_path, {"init_lora_weights": start})


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "other", 1, []])
def test_starts_that_change_the_base_model_are_refused(start: Any, tmp_path: Path) -> None:
    _, violations = parse(tmp_path, {"init_lora_weights": start})
    assert [v for v in violations if "init_lora_weights" in v] == violations != []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("bias", "lora_only"),
        ("bias", []),
        ("lora_bias", True),
        ("modules_to_save", ["embed_tokens"]),
        ("layer_replication", [[0, 1]]),
        ("fan_in_fan_out", True),
        ("megatron_config", {"a": 1}),
        ("trainable_token_indices", [1]),
        ("target_parameters", ["w"]),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("arrow_config", {"top_k": 2}),
        ("kasa_config", {"beta": 1e-4}),
        ("velora_config", {"scale": 1.0}),
        ("monteclora_config", {"num_samples": 8}),
        ("ensure_weight_tying", True),
        ("a_field_of_tomorrow", 0),
        ("a_field_of_tomorrow", "none"),
        ("\ud800\n", 1),
        ("peft_type", None),
        ("peft_type", ["LORA"]),
        ("task_type", "SEQ_2_SEQ_LM"),
        ("task_type", 0),
        ("alora_invocation_tokens", [[1]]),
        ("alora_invocation_tokens", [1, True]),
        ("alora_invocation_tokens", [1.0]),
        ("alora_invocation_tokens", [-1]),
        ("alora_invocation_tokens", [100]),
        ("invocation_string", ""),
        ("invocation_string", ["x"]),
        ("invocation_string", "\ud800"),
    ],
)
def test_one_wrong_field_is_one_violation_that_can_be_printed(field: str, value: Any, tmp_path: Path) -> None:
    _, violations = parse(tmp_path, {field: value}, encode=letters)
    assert len(violations) == 1
    assert field.strip("\ud800\n") in violations[0]
    violations[0].encode()


@pytest.mark.parametrize("off", [None, False, [], {}])
def test_unknown_fields_that_are_off_are_accepted(off: Any, tmp_path: Path) -> None:
    good(tmp_path, {"a_field_of_tomorrow": off})


@pytest.mark.parametrize("tokens", [[], [100], [-5], ["x"]])
def test_what_a_tokenizer_makes_of_the_older_text_is_checked_too(tokens: list[Any], tmp_path: Path) -> None:
    _, violations = parse(tmp_path, {"invocation_string": "<go>"}, encode=lambda text: tokens)
    assert len(violations) == 1
    assert "invocation_string" in violations[0]


def test_a_tokenizer_that_fails_is_a_violation(tmp_path: Path) -> None:
    def fails(text: str) -> list[int]:
        raise RuntimeError("no such model")

    _, violations = parse(tmp_path, {"invocation_string": "<go>"}, encode=fails)
    assert violations == ['invocation_string "<go>" cannot be tokenized: no such model']


@pytest.mark.parametrize(
    ("sidecar", "reason"),
    [
        ({}, "format null"),
        ({"format": 2}, "format 2"),
        ({"format": True}, "format true"),
        ({"format": 1, "colour": "red"}, "unknown keys"),
        ({"format": 1, "reads": "system"}, "reads is"),
        ({"format": 1, "reads": ["user"]}, "reads is"),
        ({"format": 1, "invocation_text": None}, "invocation_text is null"),
        ({"format": 1, "invocation_text": "\udfff"}, "not valid Unicode"),
        ([], "not a JSON object"),
    ],
)
def test_a_wrong_sidecar_is_reported(sidecar: Any, reason: str, tmp_path: Path) -> None:
    _, violations = parse(tmp_path, sidecar=sidecar)
    assert len(violations) == 1
    assert reason in violations[0]


@pytest.mark.parametrize(
    "content",
    [b"", b"null", b"[1]", b"{", b"\xff\xfe", b"\xef\xbb\xbf{}", b"[" * 100_000, b'{"r": ' + b"9" * 5000 + b"}"],
)
def test_a_file_that_is_no_json_object_is_one_violation(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_bytes(content)
    spec, violations = parse_config(tmp_path, shapes=SHAPES, name="a")
    assert spec is None
    assert len(violations) == 1
    assert "adapter_config.json" in violations[0]


def test_a_deeply_nested_value_is_shown_without_a_crash(tmp_path: Path) -> None:
    for depth in (100, 400, 700, 900, 980):
        text = json.dumps(PLAIN)[:-1] + ', "odd": ' + "[" * depth + "]" * depth + "}"
        (tmp_path / "adapter_config.json").write_text(text)
        _, violations = parse_config(tmp_path, shapes=SHAPES, name="a")
        assert len(violations) == 1
        assert len(violations[0]) < 300


def test_an_absurd_file_is_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_bytes(b" " * (1 << 20) + b"{}")
    assert parse_config(tmp_path, shapes=SHAPES, name="a")[1] == ["adapter_config.json is larger than 1 MiB"]


def test_the_sidecar_is_read_even_where_the_configuration_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").mkdir()
    (tmp_path / "midstream.json").write_text('{"format": 3}')
    violations = parse_config(tmp_path, shapes=SHAPES, name="a")[1]
    assert violations == ["adapter_config.json is not a file", "midstream.json has format 3, only 1 is known"]
