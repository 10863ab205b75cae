"""Adapters that a server serves without describing them, read from local PEFT folders."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

from safetensors import safe_open

from midstream.adapters.spec import CONFIG_FILE, Encode, parse_config
from midstream.errors import AdapterFormatError
from midstream.types import AdapterInfo

_WEIGHTS_FILE = "adapter_model.safetensors"
_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")


Described = str | Path | AdapterInfo
"""An adapter by its PEFT folder, whose name is its own, or as such a folder was read."""


def read_folders(adapters: Iterable[Described]) -> dict[str, AdapterInfo]:
    """Adapters by name. Raises AdapterFormatError with all violations of a folder."""
    infos = [each if isinstance(each, AdapterInfo) else read_folder(Path(each)) for each in adapters]
    return {info.name: info for info in infos}


def read_folder(folder: Path, *, name: str | None = None, encode: Encode | None = None) -> AdapterInfo:
    """What a PEFT folder says of its adapter. `digest` is that of its two files, not the one an engine would find.

    `encode` is needed for folders of the older form, which have the invocation's text and no tokens.
    """
    folder = folder.resolve()
    weights = folder / _WEIGHTS_FILE
    shapes, violations = _shapes(weights)
    spec, wrong = parse_config(folder, shapes=shapes, name=name or folder.name, encode=encode)
    violations += wrong
    if violations or spec is None:
        raise AdapterFormatError(str(folder), violations)
    digest = hashlib.sha256((folder / CONFIG_FILE).read_bytes() + weights.read_bytes())
    return AdapterInfo(
        name=spec.name,
        kind=spec.kind,
        digest=digest.hexdigest(),
        path=spec.path,
        invocation_tokens=spec.invocation_tokens,
        invocation_text=spec.invocation_text,
        rank=max(target.rank for target in spec.targets),
        size_bytes=weights.stat().st_size,
        contract=spec.contract,
        metadata={**spec.metadata, "reads": spec.reads},
    )


def _shapes(file: Path) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """The adapted layers with their (out, in), which stand for the base model's, and what is wrong with the file."""
    sides: dict[tuple[str, str], list[int]] = {}
    # The reader does not say what it raises on a damaged file; here each of its exceptions means just that.
    try:
        with safe_open(file, framework="numpy") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - no mapping
                if found := _TENSOR.fullmatch(key):
                    sides[found["module"], found["side"]] = tensors.get_slice(key).get_shape()
    except Exception as error:
        return {}, [f"{file.name} cannot be read: {error}"]
    modules = [module for module, side in sides if side == "A" and (module, "B") in sides]
    return {module: (sides[module, "B"][0], sides[module, "A"][-1]) for module in modules}, []
