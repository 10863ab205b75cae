"""midstream's own modules that this package uses: which they are, and how they get here.

vLLM needs another transformers than midstream does, so the two cannot be installed side by side, and there is one
definition of what an adapter is. A built distribution has rewritten copies in `_midstream`; in a checkout they are read
from the repository's own source when they are imported. No copy is ever committed.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Sequence
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from pathlib import Path
from types import ModuleType

PRIVATE = "midstream_vllm._midstream"
# By their names here. They import each other, torch and safetensors, which vLLM brings along.
MODULES = {
    "errors": "errors.py",
    "activation": "adapters/activation.py",
    "spec": "adapters/spec.py",
    "targets": "adapters/targets.py",
    "weights": "adapters/weights.py",
}
_HERE = Path(__file__).resolve().parent
# From the repository's root: integrations/vllm/src/midstream_vllm.
CHECKOUT = _HERE.parents[3] / "src" / "midstream"
_IMPORT = re.compile(r"^(\s*from )midstream\.(?:adapters\.)?(\w+)( import )", re.MULTILINE)


def rewritten(source: str) -> str:
    """A module's source with its imports from midstream made imports from here. Raises ValueError where one is left."""
    text = _IMPORT.sub(rf"\1{PRIVATE}.\2\3", source)
    for node in ast.walk(ast.parse(text)):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            parent, _, last = name.rpartition(".")
            if name.split(".")[0] == "midstream" or (parent == PRIVATE and last not in MODULES):
                raise ValueError(f"it imports {name}, which this package does not have")
    return text


def source(name: str) -> str:
    """A module's rewritten source: the copy of a distribution, else the checkout's. Raises OSError without either."""
    copy = _HERE / "_midstream" / f"{name}.py"
    return copy.read_text("utf-8") if copy.is_file() else rewritten((CHECKOUT / MODULES[name]).read_text("utf-8"))


def write(folder: Path) -> None:
    """Write all of them into a folder, as a distribution has them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in MODULES:
        (folder / f"{name}.py").write_text(source(name), encoding="utf-8")


class Checkout(MetaPathFinder, InspectLoader):
    """Finds and loads the modules in a checkout. They keep no bytecode: that beside the source is of the original."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        parent, _, name = fullname.rpartition(".")
        if parent != PRIVATE or name not in MODULES:
            return None
        return spec_from_loader(fullname, self, origin=str(CHECKOUT / MODULES[name]))

    def get_source(self, fullname: str) -> str:
        return source(fullname.rpartition(".")[2])


def find_in_checkout() -> None:
    """Make the modules importable where no built copy lies beside this file."""
    if not (_HERE / "_midstream" / "errors.py").is_file() and not any(isinstance(f, Checkout) for f in sys.meta_path):
        sys.meta_path.append(Checkout())
