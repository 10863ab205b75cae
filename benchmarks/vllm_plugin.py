"""The plugin of integrations/vllm as vLLM's process finds it: from this checkout, without being installed anywhere."""

from __future__ import annotations

import tomllib
from pathlib import Path

PLUGIN = Path(__file__).parents[1] / "integrations" / "vllm"


def plugin_environment(scratch: Path) -> dict[str, str]:
    """Environment variables of a vLLM process with the plugin. Writes metadata, and later adapters, into `scratch`."""
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    info = scratch / "vllm-plugin" / "midstream_vllm-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {project['name']}\nVersion: 0\n")
    groups = project["entry-points"].items()
    lines = [f"[{group}]\n{name} = {value}\n" for group, names in groups for name, value in names.items()]
    (info / "entry_points.txt").write_text("\n".join(lines))
    return {
        "PYTHONPATH": f"{PLUGIN / 'src'}:{info.parent}:{PLUGIN.parents[1]}",
        "MIDSTREAM_VLLM_ADAPTERS": str(scratch / "vllm-adapters"),
    }
