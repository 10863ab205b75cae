"""What an adapter folder says about itself: PEFT's adapter_config.json and our small sidecar, fully checked."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from midstream.adapters.targets import TargetReader, TargetSpec, is_int, shown

Encode = Callable[[str], Sequence[int]]
Shapes = Mapping[str, tuple[int, int]]
Reads = Literal["user", "assistant", "any"]

CONFIG_FILE = "adapter_config.json"
SIDECAR_FILE = "midstream.json"
CONTRACT_FILE = "io.yaml"
_MAX_CONFIG_BYTES = 1 << 20

# Fields that say how training started or ran, or which PEFT wrote; saved weights do not depend on them.
_HARMLESS = frozenset(
    {
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "lora_dropout",
        "auto_mapping",
        "peft_version",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "runtime_config",
        "megatron_core",
        "qalora_group_size",
    }
)
_UNDERSTOOD = frozenset(
    {
        "peft_type",
        "task_type",
        "r",
        "lora_alpha",
        "target_modules",
        "exclude_modules",
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
        "bias",
        "layers_to_transform",
        "layers_pattern",
        "alora_invocation_tokens",
        "invocation_string",
        "init_lora_weights",
    }
)
# Starting weights that leave the base model as it is. The others (pissa, olora, corda, loftq ...) move a part of the
# base weights into the adapter, so that its saved weights fit only a base model changed in the same way.
_PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica")
_METADATA = ("base_model_name_or_path", "revision", "peft_version")


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """A checked adapter configuration.

    `invocation_tokens` is empty for a plain LoRA. `invocation_text` is what to append when the adapter is called.
    `reads`: which end of a conversation the adapter judges. `contract`: the text of io.yaml, kept so that a folder
    that is changed or deleted later changes nothing. `metadata`: where it comes from and what it was trained for.
    """

    name: str
    path: str
    kind: Literal["lora", "alora"]
    invocation_tokens: tuple[int, ...]
    invocation_text: str
    targets: tuple[TargetSpec, ...]
    reads: Reads
    contract: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


def parse_config(
    folder: Path, *, shapes: Shapes, name: str, encode: Encode | None = None, vocab_size: int | None = None
) -> tuple[AdapterSpec | None, list[str]]:
    """Read a folder's configuration for a base model with linear layers of `shapes` (module path → (out, in)).

    `encode` tokenizes the text of the older form, which has no token ids. Returns the spec and all violations; a
    spec beside violations is as good as could be told, and None means that adapter_config.json cannot be read.
    """
    reader = _Reader(folder, encode, vocab_size)
    return reader.read(name, shapes), list(reader.violations)


class _Reader:
    """Reads one folder's configuration and collects everything that is wrong with it in `violations`."""

    def __init__(self, folder: Path, encode: Encode | None, vocab_size: int | None) -> None:
        self.violations: dict[str, None] = {}
        self._folder = folder
        self._encode = encode
        self._vocab_size = vocab_size

    def read(self, name: str, shapes: Shapes) -> AdapterSpec | None:
        config = self._json(CONFIG_FILE)
        sidecar = self._sidecar()
        if config is None:
            return None
        self._check_fields(config)
        tokens, text = self._invocation(config)
        return AdapterSpec(
            name=name,
            path=str(self._folder),
            kind="alora" if tokens else "lora",
            invocation_tokens=tokens,
            invocation_text=sidecar.get("invocation_text") or text,
            targets=TargetReader(config, self._no).read(shapes),
            reads=cast(Reads, sidecar.get("reads", "any")),
            contract=self._contract(),
            metadata={
                **{key: config[key] for key in _METADATA if isinstance(config.get(key), str)},
                **({"task": sidecar["task"]} if sidecar.get("task") else {}),
            },
        )

    # ------------------------------------------------------------------ files

    def _json(self, file: str) -> dict[str, Any] | None:
        path = self._folder / file
        try:
            if path.exists() and not path.is_file():
                self._no(f"{file} is not a file")
                return None
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

    def _contract(self) -> str | None:
        path = self._folder / CONTRACT_FILE
        try:
            if not path.exists():
                return None
            if path.stat().st_size > _MAX_CONFIG_BYTES:
                self._no(f"{CONTRACT_FILE} is larger than 1 MiB")
                return None
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            self._no(f"{CONTRACT_FILE} cannot be read: {error}")
            return None

    def _sidecar(self) -> dict[str, str]:
        try:
            if not (self._folder / SIDECAR_FILE).exists():
                return {}
        except OSError as error:
            self._no(f"{SIDECAR_FILE} cannot be read: {error}")
            return {}
        content = self._json(SIDECAR_FILE)
        if content is None:
            return {}
        unknown = set(content) - {"format", "invocation_text", "reads", "task"}
        if unknown:
            self._no(f"{SIDECAR_FILE} has unknown keys {shown(sorted(unknown))}")
        version = content.get("format")
        if not is_int(version) or version != 1:
            self._no(f"{SIDECAR_FILE} has format {shown(version)}, only 1 is known")
        reads = content.get("reads", "any")
        if reads not in ("user", "assistant", "any"):
            self._no(f"{SIDECAR_FILE}: reads is {shown(reads)}, not user, assistant or any")
            reads = "any"
        texts = {key: self._text(content.get(key, ""), f"{SIDECAR_FILE}: {key}") for key in ("invocation_text", "task")}
        return {**texts, "reads": reads}

    # ------------------------------------------------------------------ fields

    def _check_fields(self, config: dict[str, Any]) -> None:
        if config.get("peft_type") != "LORA":
            self._no(f"peft_type is {shown(config.get('peft_type'))}, only LORA is supported")
        if config.get("task_type") not in (None, "CAUSAL_LM"):
            self._no(f"task_type is {shown(config['task_type'])}, only CAUSAL_LM is supported")
        if config.get("bias") not in (None, "none"):
            self._no(f"bias is {shown(config['bias'])}, only none is supported")
        start = config.get("init_lora_weights")
        if not (start is None or isinstance(start, bool) or str(start).lower() in _PLAIN_STARTS):
            self._no(
                f"init_lora_weights is {shown(start)}, which may change the base model's weights; "
                "save the adapter for the unchanged base model (path_initial_model_for_weight_conversion)"
            )
        for name, value in sorted(config.items()):
            if name not in _UNDERSTOOD and name not in _HARMLESS and not _is_off(value):
                self._no(f"{shown(name)[1:-1]}={shown(value)} is not supported and may change the result")

    def _invocation(self, config: dict[str, Any]) -> tuple[tuple[int, ...], str]:
        """The invocation tokens, empty for a plain LoRA or where they are wrong, and the text of the older form."""
        text = ""
        if config.get("invocation_string") is not None:
            text = self._text(config["invocation_string"], "invocation_string", empty=False)
        tokens = config.get("alora_invocation_tokens")
        source = "alora_invocation_tokens"
        if tokens is None and text:
            tokens, source = self._tokenized(text), f"invocation_string {shown(text)}, tokenized,"
        if tokens is None:
            return (), text
        if not isinstance(tokens, list) or not tokens or not all(is_int(t) for t in tokens):
            self._no(f"{source} is {shown(tokens)}, not a list of one or more token ids")
            return (), text
        wrong = [t for t in tokens if t < 0 or (self._vocab_size is not None and t >= self._vocab_size)]
        if wrong:
            self._no(f"{source} has {shown(wrong[:4])}, outside this base model's vocabulary")
        return tuple(tokens), text

    def _tokenized(self, text: str) -> list[int] | None:
        if self._encode is None:
            self._no("invocation_string needs a tokenizer; give alora_invocation_tokens instead")
            return None
        # A tokenizer is foreign code, and what it raises on a strange text is its own affair.
        try:
            return [int(token) for token in self._encode(text)]
        except Exception as error:
            self._no(f"invocation_string {shown(text)} cannot be tokenized: {error}")
            return None

    def _text(self, value: Any, where: str, *, empty: bool = True) -> str:
        if not isinstance(value, str) or not (value or empty):
            self._no(f"{where} is {shown(value)}, not a text")
            return ""
        try:
            value.encode()
        except UnicodeEncodeError:
            self._no(f"{where} is {shown(value)}, which is not valid Unicode")
            return ""
        return value

    def _no(self, violation: str) -> None:
        self.violations[violation] = None


def _is_off(value: Any) -> bool:
    """Whether a field that is not implemented has a value that changes nothing."""
    return value is None or value is False or value == [] or value == {}
