"""An adapter's weights: read from safetensors only, checked against the base model, and known by their digest."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from midstream.adapters.spec import AdapterSpec, ConfigReader, Encode, Shapes, TargetSpec
from midstream.errors import AdapterFormatError

WEIGHTS_FILE = "adapter_model.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")


@dataclass(frozen=True, slots=True)
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

    `dtype` None keeps each tensor's own. Raises AdapterFormatError with all violations; nothing else.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise AdapterFormatError(str(folder), ["it is not a folder"])
    reader = ConfigReader(folder, shapes=shapes, encode=encode, vocab_size=vocab_size)
    spec = reader.read(name or folder.resolve().name)
    tensors, problems = _read_tensors(folder)
    violations = [*reader.violations, *problems]
    if spec is not None and tensors is not None:
        violations += _check_tensors(spec, tensors, shapes)
    if violations or spec is None or tensors is None:
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


Tensors = dict[tuple[str, str], Tensor]


def _read_tensors(folder: Path) -> tuple[Tensors | None, list[str]]:
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
        if pickles:
            return None, [
                f"{', '.join(pickles)} is a pickle file, which can run code when it is read; "
                f"only {WEIGHTS_FILE} is accepted"
            ]
        return None, [f"{WEIGHTS_FILE} is missing"]
    tensors: Tensors = {}
    problems: list[str] = []
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a mapping
                match = _TENSOR.fullmatch(key)
                if match is None:
                    problems.append(f"tensor {key} is not a LoRA weight of a linear layer")
                    continue
                tensors[match["module"], match["side"]] = file.get_tensor(key)
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError, AttributeError, KeyError) as error:
        return None, [f"{WEIGHTS_FILE} is truncated or damaged: {error}"]
    return tensors, problems


def _check_tensors(spec: AdapterSpec, tensors: Tensors, shapes: Shapes) -> list[str]:
    problems: list[str] = []
    wanted = {target.module for target in spec.targets}
    foreign = sorted({module for module, _ in tensors} - set(shapes))
    if foreign:
        problems.append(
            f"{len(foreign)} modules are not in this base model, among them {foreign[0]} "
            "(another base model, or another prefix of the names)"
        )
    extra = sorted({module for module, _ in tensors} & set(shapes) - wanted)
    if extra:
        problems.append(f"{len(extra)} modules have weights but are no target, among them {extra[0]}")
    missing = [f"{t.module}.lora_{side}" for t in spec.targets for side in "AB" if (t.module, side) not in tensors]
    if missing:
        problems.append(f"{len(missing)} tensors are missing, among them {missing[0]}")
    for target in spec.targets:
        problems += _check_target(target, tensors, shapes)
    return problems[:20] + ([f"and {len(problems) - 20} more"] if len(problems) > 20 else [])


def _check_target(target: TargetSpec, tensors: Tensors, shapes: Shapes) -> list[str]:
    problems: list[str] = []
    out_features, in_features = shapes[target.module]
    expected = {"A": (target.rank, in_features), "B": (out_features, target.rank)}
    for side, shape in expected.items():
        tensor = tensors.get((target.module, side))
        if tensor is None:
            continue
        where = f"{target.module}.lora_{side}"
        if tuple(tensor.shape) != shape:
            problems.append(f"{where} has shape {list(tensor.shape)}, this base model and rank need {list(shape)}")
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            problems.append(f"{where} has type {tensor.dtype}, expected float32, bfloat16 or float16")
        elif not bool(torch.isfinite(tensor).all()):
            problems.append(f"{where} has NaN or infinite values")
    return problems


def _digest(spec: AdapterSpec, tensors: Tensors) -> str:
    """sha256 over all that changes the adapter's result: targets, ranks, scales, invocation tokens, weights."""
    config = {
        "kind": spec.kind,
        "invocation": spec.invocation_tokens,
        "targets": sorted((t.module, t.rank, t.scale) for t in spec.targets),
    }
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for (module, side), tensor in sorted(tensors.items(), key=lambda item: item[0]):
        digest.update(f"{module}|{side}|{tensor.dtype}|{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
