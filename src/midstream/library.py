"""Where the trained adapters of a model are."""

from __future__ import annotations

import os
from pathlib import Path


def library_folder(model_name: str) -> Path | None:
    """The trained adapters of a model: below $MIDSTREAM_LIBRARY, else library/ of the checkout this runs from."""
    roots = [Path(__file__).parents[2] / "library"]
    if named := os.environ.get("MIDSTREAM_LIBRARY"):
        roots.insert(0, Path(named))
    return next((root / model_name for root in roots if (root / model_name).is_dir()), None)


def library_adapters(model_name: str) -> list[Path]:
    """The adapter folders that the library has for a model, by name."""
    root = library_folder(model_name)
    return sorted(path.parent for path in root.glob("*/adapter_config.json")) if root is not None else []
