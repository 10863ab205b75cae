"""Adapters as they were when they were read: one folder each, named by kind and digest, that nobody edits.

vLLM reads an adapter's files whenever it needs them again, long after they were checked. From here it always reads what
was checked, so an adapter's number, its weights and its key in the prefix cache can never part, whatever happens to the
folder that it came from. The folders may be deleted when no server runs.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from midstream_vllm.core import CONFIG_FILE, WEIGHTS_FILE, AdapterFormatError, AdapterSpec, load_adapter
from midstream_vllm.ownership import kept_name

FOLDER_VARIABLE = "MIDSTREAM_VLLM_ADAPTERS"
_ACTIVATION = ("alora_invocation_tokens", "invocation_string")
_PREFIX, _SIDE = "base_model.model.", ".lora_"


@dataclass(frozen=True, slots=True)
class Kept:
    """A checked adapter, and the folder from which engines read it: there it is a plain LoRA."""

    spec: AdapterSpec
    digest: str
    path: Path


@dataclass(frozen=True, slots=True)
class Base:
    """What an adapter is checked against. `shapes` None: only against its own weights."""

    shapes: Mapping[str, tuple[int, int]] | None
    vocab_size: int
    encode: Callable[[str], Sequence[int]] | None
    max_rank: int
    # Whether vLLM can give modules of one adapter different ranks and scales.
    patterns: bool = True


def adapters_folder() -> Path:
    """Where adapters are kept: what $MIDSTREAM_VLLM_ADAPTERS says, which the machines of one engine must share."""
    chosen = os.environ.get(FOLDER_VARIABLE)
    return Path(chosen) if chosen else Path.home() / ".cache" / "midstream" / "vllm-adapters"


def keep(folder: Path, name: str, base: Base, root: Path) -> Kept:
    """Check an adapter's folder and keep what it has now. Raises AdapterFormatError with all that is wrong with it."""
    root.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".reading-", dir=root))
    try:
        return _keep(_copied(folder, scratch), folder, name, base, root)
    except AdapterFormatError as error:
        raise AdapterFormatError(str(folder), error.violations) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _copied(folder: Path, scratch: Path) -> Path:
    """A copy that cannot change any more, or the folder itself where its errors are all there is to tell."""
    try:
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            shutil.copyfile(folder / file, scratch / file)
    except OSError:
        return folder
    return scratch


def _keep(copy: Path, folder: Path, name: str, base: Base, root: Path) -> Kept:
    shapes = _own_shapes(copy) if base.shapes is None else base.shapes
    adapter = load_adapter(copy, shapes=shapes, name=name, encode=base.encode, vocab_size=base.vocab_size)
    violations = _beyond_vllm(adapter.spec, base)
    if copy == folder:
        violations.append("its files changed while they were read; load it again")
    if violations:
        raise AdapterFormatError(str(folder), violations)
    kept = root / kept_name(adapter.spec.kind, adapter.digest)
    if not kept.is_dir():
        config = json.loads((copy / CONFIG_FILE).read_text("utf-8"))
        plain = {field: value for field, value in config.items() if field not in _ACTIVATION}
        (copy / CONFIG_FILE).write_text(json.dumps(plain), encoding="utf-8")
        _moved(copy, kept)
    return Kept(adapter.spec, adapter.digest, kept)


def _beyond_vllm(spec: AdapterSpec, base: Base) -> list[str]:
    """What is in order for midstream and cannot be done by this vLLM as it was started."""
    violations: list[str] = []
    rank = max(target.rank for target in spec.targets)
    if rank > base.max_rank:
        violations.append(f"its rank is {rank}, and vLLM was started with --max-lora-rank {base.max_rank}")
    if not base.patterns and len({(target.rank, target.scale) for target in spec.targets}) > 1:
        violations.append("its modules differ in rank or scale, which this version of vLLM cannot do")
    return violations


def _moved(copy: Path, kept: Path) -> None:
    """Move the copy to its place, where another process may have put the same meanwhile."""
    copy.chmod(0o755)
    try:
        copy.rename(kept)
    except OSError:
        if not kept.is_dir():
            raise


def _own_shapes(folder: Path) -> dict[str, tuple[int, int]]:
    """The layers for which an adapter has weights, as large as those are; none where they cannot be read."""
    sides: dict[str, dict[str, list[int]]] = {}
    try:
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                module, _, rest = name.removeprefix(_PREFIX).partition(_SIDE)
                sides.setdefault(module, {})[rest[:1]] = file.get_slice(name).get_shape()
    except Exception:  # whatever is wrong with the file, load_adapter says it
        return {}
    whole = {module: found for module, found in sides.items() if {"A", "B"} <= found.keys()}
    return {module: (found["B"][0], found["A"][-1]) for module, found in whole.items()}
