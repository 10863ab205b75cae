"""Our reading of a configuration's targets against PEFT's own functions."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from midstream.adapters.targets import TargetReader

MODULES = (
    "q_proj",
    "lm_head",
    "transformer.h.10.attn.q_proj",
    "model.xq_proj",
    "model.experts.2.layers.1.up_proj",
    *(f"model.layers.{i}.self_attn.{name}" for i in range(3) for name in ("q_proj", "k_proj")),
    *(f"model.layers.{i}.mlp.experts.{j}.up_proj" for i in (0, 1, 11) for j in (0, 1)),
)
NAMES = st.sampled_from(["q_proj", "k_proj", "up_proj", "self_attn.k_proj", "model.layers.1.self_attn.q_proj", "nope"])
EXPRESSIONS = st.sampled_from(
    [r".*", r".*q_proj", r"q_proj", r".*layers\.[01]\..*(q|up)_proj", r"model\.layers\.1\..*", r"(q|k)_proj"]
)
KEYS = st.one_of(NAMES, EXPRESSIONS, st.sampled_from(["layers.1.self_attn.q_proj", r"layers\.\d.*up_proj", "proj"]))
LAYERS = st.one_of(st.none(), st.integers(0, 11), st.lists(st.integers(0, 11), max_size=3))
LAYER_NAMES = st.sampled_from([None, "", [], "layers", ["layers"], ["h", "layers"], "experts", "layers|h", "lay.rs"])


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    by_list = draw(st.booleans())
    config: dict[str, Any] = {
        "r": draw(st.integers(1, 64)),
        "lora_alpha": draw(st.integers(1, 64)),
        "target_modules": draw(st.lists(NAMES, min_size=1, max_size=3) if by_list else EXPRESSIONS),
        "exclude_modules": draw(st.one_of(st.none(), st.lists(NAMES, max_size=2), EXPRESSIONS)),
        "rank_pattern": draw(st.dictionaries(KEYS, st.integers(1, 64), max_size=3)),
        "alpha_pattern": draw(st.dictionaries(KEYS, st.integers(1, 64), max_size=3)),
        "use_rslora": draw(st.booleans()),
    }
    if by_list:
        config["layers_to_transform"] = draw(LAYERS)
        if config["layers_to_transform"] is not None:
            config["layers_pattern"] = draw(LAYER_NAMES)
    return config


def by_peft(config: dict[str, Any]) -> dict[str, tuple[int, float]]:
    """Rank and scale of each target, as PEFT's own functions tell them."""
    lora = LoraConfig(**config)
    found = {}
    for module in MODULES:
        if check_target_module_exists(lora, module):
            rank = lora.rank_pattern.get(get_pattern_key(lora.rank_pattern.keys(), module), lora.r)
            alpha = lora.alpha_pattern.get(get_pattern_key(lora.alpha_pattern.keys(), module), lora.lora_alpha)
            found[module] = (rank, alpha / (math.sqrt(rank) if lora.use_rslora else rank))
    return found


def read(config: dict[str, Any]) -> tuple[dict[str, tuple[int, float]], list[str]]:
    violations: list[str] = []
    targets = TargetReader(config, violations.append).read(MODULES)
    return {target.module: (target.rank, target.scale) for target in targets}, violations


@settings(deadline=None, max_examples=120)
@given(configs())
def test_targets_ranks_and_scales_are_those_of_pefts_functions(config: dict[str, Any]) -> None:
    expected = by_peft(config)
    targets, violations = read(config)
    assert targets == expected
    assert bool(violations) == (not expected)


def test_all_linear_in_any_case_means_every_layer_but_the_output_head() -> None:
    for written in ("all-linear", "All-Linear"):
        targets, violations = read({"target_modules": written})
        assert set(targets) == set(MODULES) - {"lm_head"}
        assert not violations


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"target_modules": None}, "match no linear layer"),
        ({"target_modules": ["q_proj", 5]}, "target_modules is"),
        ({"target_modules": {"q_proj": 1}}, "target_modules is"),
        ({"exclude_modules": 3}, "exclude_modules is 3"),
        ({"exclude_modules": "("}, "exclude_modules"),
        ({"layers_to_transform": True}, "layers_to_transform is true"),
        ({"layers_to_transform": [0, "1"]}, "layers_to_transform"),
        ({"layers_to_transform": [0], "layers_pattern": [1]}, "layers_pattern is [1]"),
        ({"layers_to_transform": [0], "layers_pattern": "("}, "not a regular expression"),
        ({"layers_pattern": "layers"}, "layers_pattern needs layers_to_transform"),
        ({"target_modules": ".*", "layers_to_transform": [0]}, "need target_modules to be a list"),
        ({"target_modules": "all-linear", "layers_to_transform": [0]}, "need target_modules to be a list"),
        ({"rank_pattern": []}, "rank_pattern is []"),
        ({"rank_pattern": {"q_proj": 2.0}}, "rank_pattern"),
        ({"rank_pattern": {"(": 2}}, "not a regular expression"),
        ({"rank_pattern": {str(i): 1 for i in range(10_001)}}, "10001 entries"),
        ({"alpha_pattern": {"q_proj": float("nan")}}, "alpha_pattern"),
        ({"r": True}, "r is true"),
        ({"r": 4.0}, "r is 4.0"),
        ({"r": 10**30}, "r is 1000"),
        ({"lora_alpha": -1}, "lora_alpha is -1"),
        ({"use_rslora": "true"}, "use_rslora is"),
        ({"use_rslora": 1}, "use_rslora is 1"),
    ],
)
def test_values_that_would_be_guessed_at_are_reported(changes: dict[str, Any], reason: str) -> None:
    _, violations = read({"target_modules": ["q_proj"], **changes})
    assert any(reason in violation for violation in violations), violations
    assert all(len(violation) < 400 for violation in violations)
