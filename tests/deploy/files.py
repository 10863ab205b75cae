"""What deploy/ holds, read for the tests."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
_VARIABLE = re.compile(r"\$\{(\w+):-([^}]*)\}")


def compose_text(given: Mapping[str, str]) -> str:
    """The Compose file with its variables filled in, as Compose does it."""
    text = (DEPLOY / "compose.yaml").read_text(encoding="utf-8")
    return _VARIABLE.sub(lambda found: given.get(found[1], found[2]), text)


def services() -> dict[str, dict[str, Any]]:
    """Compose's services, anchors and defaults resolved."""
    found = yaml.safe_load(compose_text({}))["services"]
    assert isinstance(found, dict)
    return found


def manifests() -> list[dict[str, Any]]:
    """Kubernetes' objects of all files that the kustomization lists."""
    listed = yaml.safe_load((DEPLOY / "kustomization.yaml").read_text(encoding="utf-8"))["resources"]
    texts = [(DEPLOY / name).read_text(encoding="utf-8") for name in listed]
    return [each for text in texts for each in yaml.safe_load_all(text)]


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    """The pods' specifications by the name of what makes them."""
    for each in manifests():
        if each["kind"] in ("Deployment", "StatefulSet"):
            yield each["metadata"]["name"], each["spec"]["template"]["spec"]


def named(kind: str, name: str) -> dict[str, Any]:
    found = [each for each in manifests() if each["kind"] == kind and each["metadata"]["name"] == name]
    assert len(found) == 1, f"{len(found)} of {kind} {name}"
    return found[0]


def commands() -> dict[str, list[str]]:
    """The arguments of vLLM and of the front, by file and service."""
    found = {f"compose {name}": each["command"] for name, each in services().items() if "command" in each}
    for name, pod in pods():
        found |= {f"kubernetes {name}": one["args"] for one in pod["containers"] if "args" in one}
    return found
