"""An adapter's weights: read from safetensors only, checked against the base model, and known by their digest."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from midstream.adapters.spec import AdapterSpec, Encode, Shapes, parse_config
from midstream.errors import AdapterFormatError

WEIGHTS_FILE = "adapter_model.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")
# Names in safetensors, and in messages.
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_SHOWN = 20

# (module path, "A" or "B")
Key = tuple[str, str]


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class LoraWeights:
    """The delta of one linear layer: scale · b a, with a [rank, in] and b [out, rank]."""

    a: Tensor
    b: Tensor
    scale: float


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """A loaded adapter. `digest` is the owner in KV keys; `weights` are by module path."""

    spec: AdapterSpec
    digest: str
    weights: Mapping[str, LoraWeights]
    size_bytes: int

    @property
    def rank(self) -> int:
        """The largest rank of its layers."""
        return max(target.rank for target in self.spec.targets)


def load_adapter(
    folder: Path,
    *,
    shapes: Shapes,
    name: str | None = None,
    encode: Encode | None = None,
    vocab_size: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Adapter:
    """Load a PEFT folder for a base model whose linear layers have `shapes` (module path → (out, in)).

    `dtype` None keeps each tensor's own. Raises AdapterFormatError with all violations; nothing else. The weights
    are copies: a folder that is edited later changes nothing here.
    """
    folder = Path(folder)
    if not _is_folder(folder):
        raise AdapterFormatError(str(folder), ["it is not a folder"])
    spec, violations = parse_config(
        folder, shapes=shapes, name=name or folder.resolve().name, encode=encode, vocab_size=vocab_size
    )
    tensors, problems = _read(folder, None if spec is None else _expected(spec, shapes), dtype)
    violations += problems[:_SHOWN]
    if len(problems) > _SHOWN:
        violations.append(f"and {len(problems) - _SHOWN} more of {WEIGHTS_FILE}")
    if violations or spec is None:
        raise AdapterFormatError(str(folder), violations)
    weights = {
        target.module: LoraWeights(
            tensors[target.module, "A"].to(device=device, dtype=dtype),
            tensors[target.module, "B"].to(device=device, dtype=dtype),
            target.scale,
        )
        for target in spec.targets
    }
    size = sum(w.a.nbytes + w.b.nbytes for w in weights.values())
    return Adapter(spec, _digest(spec, tensors), weights, size)


class Expected:
    """What a configuration asks of the weights file: the shape of each tensor, and which modules there are."""

    def __init__(self, tensors: Mapping[Key, tuple[int, int]], modules: Iterable[str]) -> None:
        self.tensors = tensors
        self.modules = frozenset(modules)


def _expected(spec: AdapterSpec, shapes: Shapes) -> Expected:
    tensors: dict[Key, tuple[int, int]] = {}
    for target in spec.targets:
        out_features, in_features = shapes[target.module]
        tensors[target.module, "A"] = (target.rank, in_features)
        tensors[target.module, "B"] = (out_features, target.rank)
    return Expected(tensors, shapes)


def _read(folder: Path, expected: Expected | None, dtype: torch.dtype | None) -> tuple[dict[Key, Tensor], list[str]]:
    """The tensors, and all that is wrong with the file; `expected` None checks only that it is one of LoRA weights."""
    missing = _missing_file(folder)
    if missing is not None:
        return {}, [missing]
    # The reader does not say what it raises on a damaged file; here each of its exceptions means just that.
    try:
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
            return _read_open(file, expected, dtype)
    except Exception as error:
        return {}, [f"{WEIGHTS_FILE} is truncated or damaged: {error}"]


def _missing_file(folder: Path) -> str | None:
    try:
        if (folder / WEIGHTS_FILE).is_file():
            return None
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    except OSError as error:
        return f"the folder cannot be read: {error}"
    if not pickles:
        return f"{WEIGHTS_FILE} is missing"
    return f"{', '.join(pickles)} is a pickle file, which can run code when it is read; only {WEIGHTS_FILE} is accepted"


def _read_open(
    file: safe_open, expected: Expected | None, dtype: torch.dtype | None
) -> tuple[dict[Key, Tensor], list[str]]:
    problems: list[str] = []
    names: dict[Key, str] = {}
    for name in file.keys():  # noqa: SIM118 - not a mapping
        match = _TENSOR.fullmatch(name)
        if match is None:
            problems.append(f"tensor {name} is not a LoRA weight of a linear layer")
        elif (key := (match["module"], match["side"])) in names:
            problems.append(f"tensor {name} is there twice, also as {names[key]}")
        else:
            names[key] = name
    if expected is None:
        return {}, problems
    problems += _compare(names, expected)
    tensors: dict[Key, Tensor] = {}
    for key in sorted(names.keys() & expected.tensors.keys()):
        problem = _check_header(file, names[key], key, expected.tensors[key])
        if problem is None:
            # The reader maps the file: without a copy, a later edit of it would change the weights but not the digest.
            tensors[key] = file.get_tensor(names[key]).clone()
            problem = _check_values(tensors[key], key, dtype)
        problems += [] if problem is None else [problem]
    return tensors, problems


def _compare(names: Mapping[Key, str], expected: Expected) -> list[str]:
    """Tensors too many or too few."""
    problems: list[str] = []
    modules = {module for module, _ in names}
    targets = {module for module, _ in expected.tensors}
    foreign = sorted(modules - expected.modules)
    if foreign:
        problems.append(
            f"{len(foreign)} modules are not in this base model, among them {foreign[0]} "
            "(another base model, or another prefix of the names)"
        )
    extra = sorted((modules & expected.modules) - targets)
    if extra:
        problems.append(f"{len(extra)} modules have weights but are no target, among them {extra[0]}")
    missing = [f"{module}.lora_{side}" for module, side in expected.tensors if (module, side) not in names]
    if missing:
        problems.append(f"{len(missing)} tensors are missing, among them {missing[0]}")
    return problems


def _check_header(file: safe_open, name: str, key: Key, shape: tuple[int, int]) -> str | None:
    """Compare type and shape before the tensor takes any memory."""
    where = f"{key[0]}.lora_{key[1]}"
    header = file.get_slice(name)
    if list(header.get_shape()) != list(shape):
        return f"{where} has shape {list(header.get_shape())}, this base model and rank need {list(shape)}"
    if header.get_dtype() not in _DTYPES:
        return f"{where} has type {header.get_dtype()}, expected {', '.join(_DTYPES.values())}"
    return None


def _check_values(tensor: Tensor, key: Key, dtype: torch.dtype | None) -> str | None:
    if bool(torch.isfinite(tensor.to(dtype)).all()):
        return None
    kind = "" if dtype in (None, tensor.dtype) else f" as {str(dtype).removeprefix('torch.')}"
    return f"{key[0]}.lora_{key[1]} has NaN or infinite values{kind}"


def _digest(spec: AdapterSpec, tensors: Mapping[Key, Tensor]) -> str:
    """sha256 over all that changes the adapter's result: targets, ranks, scales, invocation tokens, weights."""
    config = {
        "kind": spec.kind,
        "invocation": spec.invocation_tokens,
        "targets": sorted((t.module, t.rank, t.scale) for t in spec.targets),
    }
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for (module, side), tensor in sorted(tensors.items(), key=lambda item: item[0]):
        digest.update(f"{module}|{side}|{tensor.dtype}|{tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _is_folder(folder: Path) -> bool:
    try:
        return folder.is_dir()
    except OSError:
        return False
