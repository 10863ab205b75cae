"""What an adapter folder says about itself: PEFT's adapter_config.json and our small sidecar, fully checked."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

Encode = Callable[[str], Sequence[int]]
Shapes = Mapping[str, tuple[int, int]]
Reads = Literal["user", "assistant", "any"]

_MAX_CONFIG_BYTES = 1 << 20

# Fields that say how training started or ran, or which PEFT wrote; saved weights do not depend on them.
_HARMLESS = frozenset(
    "base_model_name_or_path revision inference_mode lora_dropout init_lora_weights auto_mapping peft_version "
    "loftq_config eva_config corda_config lora_ga_config runtime_config megatron_core qalora_group_size "
    "ephemeral_gpu_offload ensure_weight_tying".split()
)
_UNDERSTOOD = frozenset(
    "peft_type task_type r lora_alpha target_modules exclude_modules rank_pattern alpha_pattern use_rslora "
    "layers_to_transform layers_pattern alora_invocation_tokens invocation_string".split()
)
# Values with which a field that we do not implement changes nothing.
_OFF: tuple[Any, ...] = (None, False, "none", [], {})


@dataclass(frozen=True, slots=True)
class TargetSpec:
    """One adapted linear layer: y += scale · B A x with rank rows in A."""

    module: str
    rank: int
    scale: float


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """A checked adapter configuration. `reads`: which end of a conversation the adapter judges."""

    name: str
    path: str
    kind: Literal["lora", "alora"]
    invocation_tokens: tuple[int, ...]
    invocation_text: str
    targets: tuple[TargetSpec, ...]
    reads: Reads


class ConfigReader:
    """Reads one folder's configuration and collects everything that is wrong with it in `violations`."""

    def __init__(
        self, folder: Path, *, shapes: Shapes, encode: Encode | None = None, vocab_size: int | None = None
    ) -> None:
        self.violations: list[str] = []
        self._folder = folder
        self._shapes = shapes
        self._encode = encode
        self._vocab_size = vocab_size

    def read(self, name: str) -> AdapterSpec | None:
        """The spec, as far as it can be told; complete only if `violations` stays empty."""
        config = self._json("adapter_config.json")
        if config is None:
            return None
        self._check_fields(config)
        sidecar = self._sidecar()
        text = sidecar.get("invocation_text", "")
        tokens = self._invocation(config)
        if tokens is not None and not text and isinstance(config.get("invocation_string"), str):
            text = config["invocation_string"]
        return AdapterSpec(
            name=name,
            path=str(self._folder),
            kind="lora" if tokens is None else "alora",
            invocation_tokens=tokens or (),
            invocation_text=text,
            targets=self._targets(config),
            reads=cast(Reads, sidecar.get("reads", "any")),
        )

    # ------------------------------------------------------------------ files

    def _json(self, file: str) -> dict[str, Any] | None:
        path = self._folder / file
        try:
            if path.stat().st_size > _MAX_CONFIG_BYTES:
                self._no(f"{file} is larger than 1 MiB")
                return None
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            self._no(f"{file} is missing")
            return None
        except (OSError, ValueError, RecursionError) as error:
            self._no(f"{file} cannot be read: {error}")
            return None
        if not isinstance(content, dict):
            self._no(f"{file} is not a JSON object")
            return None
        return content

    def _sidecar(self) -> dict[str, str]:
        if not (self._folder / "midstream.json").exists():
            return {}
        content = self._json("midstream.json") or {}
        unknown = set(content) - {"format", "invocation_text", "reads"}
        if unknown:
            self._no(f"midstream.json has unknown keys {sorted(unknown)}")
        if content and content.get("format") != 1:
            self._no(f"midstream.json has format {content.get('format')!r}, only 1 is known")
        found: dict[str, str] = {}
        if isinstance(text := content.get("invocation_text", ""), str):
            found["invocation_text"] = text
        else:
            self._no("midstream.json: invocation_text is not a text")
        if content.get("reads", "any") in ("user", "assistant", "any"):
            found["reads"] = content.get("reads", "any")
        else:
            self._no(f"midstream.json: reads is {content['reads']!r}, not user, assistant or any")
        return found

    # ------------------------------------------------------------------ fields

    def _check_fields(self, config: dict[str, Any]) -> None:
        if config.get("peft_type") != "LORA":
            self._no(f"peft_type is {config.get('peft_type')!r}, only LORA is supported")
        if config.get("task_type") not in (None, "CAUSAL_LM"):
            self._no(f"task_type is {config['task_type']!r}, only CAUSAL_LM is supported")
        for field, value in sorted(config.items()):
            if field not in _UNDERSTOOD and field not in _HARMLESS and not any(value is o or value == o for o in _OFF):
                self._no(f"{field}={json.dumps(value)[:80]} is not supported and would change the result")

    def _invocation(self, config: dict[str, Any]) -> tuple[int, ...] | None:
        tokens = config.get("alora_invocation_tokens")
        if tokens is None:
            return self._old_invocation(config)
        if not isinstance(tokens, list) or not tokens or not all(_is_int(t) for t in tokens):
            self._no("alora_invocation_tokens is not a list of one or more token ids")
            return None
        wrong = [t for t in tokens if t < 0 or (self._vocab_size is not None and t >= self._vocab_size)]
        if wrong:
            self._no(f"alora_invocation_tokens has {wrong[:4]}, outside this base model's vocabulary")
        return tuple(tokens)

    def _old_invocation(self, config: dict[str, Any]) -> tuple[int, ...] | None:
        """The older form: a text and no tokens, tokenized here."""
        text = config.get("invocation_string")
        if text is None:
            return None
        if not isinstance(text, str) or not text:
            self._no("invocation_string is not a text")
            return None
        if self._encode is None:
            self._no("invocation_string needs a tokenizer; give alora_invocation_tokens instead")
            return None
        return tuple(self._encode(text))

    # ------------------------------------------------------------------ targets

    def _targets(self, config: dict[str, Any]) -> tuple[TargetSpec, ...]:
        rank = self._positive(config.get("r", 8), "r", whole=True)
        alpha = self._positive(config.get("lora_alpha", 8), "lora_alpha", whole=False)
        ranks = self._pattern(config, "rank_pattern", whole=True)
        alphas = self._pattern(config, "alpha_pattern", whole=False)
        modules = [m for m in self._shapes if self._is_target(m, config)]
        if not modules:
            self._no(
                f"target_modules {json.dumps(config.get('target_modules'))[:120]} match no linear layer of this base model"
            )
        rslora = config.get("use_rslora") is True
        targets: list[TargetSpec] = []
        for module in modules:
            r = int(_by_pattern(ranks, module, rank))
            a = _by_pattern(alphas, module, alpha)
            targets.append(TargetSpec(module, r, a / math.sqrt(r) if rslora else a / r))
        return tuple(targets)

    def _is_target(self, module: str, config: dict[str, Any]) -> bool:
        if _listed(module, config.get("exclude_modules"), self._match):
            return False
        targets = config.get("target_modules")
        if targets == "all-linear":
            return True
        if not _listed(module, targets, self._match):
            return False
        return isinstance(targets, str) or self._layer_chosen(module, config)

    def _layer_chosen(self, module: str, config: dict[str, Any]) -> bool:
        """PEFT's layers_to_transform: only modules inside one of these layers."""
        chosen = config.get("layers_to_transform")
        if chosen is None:
            return True
        layers = [chosen] if isinstance(chosen, int) else chosen
        patterns = config.get("layers_pattern")
        names = [patterns] if isinstance(patterns, str) else patterns
        prefix = r"[^.]*" if not names else "(?:" + "|".join(re.escape(str(n)) for n in names) + ")"
        found = re.match(rf".*\.{prefix}\.(\d+)\.", module)
        return found is not None and isinstance(layers, list) and int(found.group(1)) in layers

    def _match(self, pattern: str, module: str) -> bool:
        try:
            return re.fullmatch(pattern, module) is not None
        except (re.error, RecursionError) as error:
            self._no(f"{pattern[:60]!r} is not a regular expression: {error}")
            return False

    def _pattern(self, config: dict[str, Any], field: str, *, whole: bool) -> dict[str, float]:
        value = config.get(field) or {}
        if not isinstance(value, dict):
            self._no(f"{field} is not an object")
            return {}
        return {key: self._positive(number, f"{field}[{key}]", whole=whole) for key, number in value.items()}

    def _positive(self, value: Any, field: str, *, whole: bool) -> float:
        is_number = _is_int(value) or (not whole and isinstance(value, float))
        if not is_number or not 0 < value < 1e6:
            self._no(f"{field} is {json.dumps(value)[:40]}, not a positive {'whole number' if whole else 'number'}")
            return 1.0
        return float(value)

    def _no(self, violation: str) -> None:
        if violation not in self.violations:
            self.violations.append(violation)


def _by_pattern(patterns: Mapping[str, float], module: str, default: float) -> float:
    """PEFT's rule: the first key that is the module's name or, as an expression, the end of its path."""
    for key, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        except re.error:
            if module == key or module.endswith(f".{key}"):
                return value
    return default


def _listed(module: str, wanted: Any, match: Callable[[str, str], bool]) -> bool:
    if isinstance(wanted, str):
        return match(wanted, module)
    if not isinstance(wanted, list):
        return False
    return any(isinstance(name, str) and (module == name or module.endswith(f".{name}")) for name in wanted)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
