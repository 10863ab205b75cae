"""A folder with all that flows need on the command line: a tiny model, six tiny intrinsics, documents."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from midstream.engine.engine import AsyncEngine
from tests.flows.engines import intrinsics_engine, make_short_intrinsics
from tests.helpers import tiny_llama
from tests.tiny import save_tiny_tokenizer

DOCUMENTS = {
    "hours": "The museum opens at nine.\nIt closes at five.",
    "tickets": "A ticket for the museum costs ten euros.",
    "way": "The tram stops in front of the door.",
}
# What two runs of one flow may differ in: time, and what was in the cache before.
_PASSING = frozenset({"seconds", "usage", "tokens_spent", "generating_tokens", "judging_tokens", "tokens", "calls"})


def write_home(root: Path) -> Path:
    """`tiny` is the model, `adapters` the intrinsics, `docs` the documents."""
    tiny_llama().save_pretrained(root / "tiny")
    save_tiny_tokenizer(root / "tiny")
    make_short_intrinsics(root / "adapters")
    (root / "docs").mkdir()
    for name, text in DOCUMENTS.items():
        (root / "docs" / f"{name}.txt").write_text(text)
    return root


def home_engine(home: Path, **config: Any) -> AsyncEngine:
    """An engine with the weights that the folder has."""
    return asyncio.run(intrinsics_engine(sorted((home / "adapters").iterdir()), **config))


def lasting(result: Any) -> Any:
    """What is the same in each run of a flow with the same seed."""
    if isinstance(result, Mapping):
        shown = {name: lasting(value) for name, value in result.items() if name not in _PASSING}
        if "decisions" in shown:  # of calls that run at the same time, either may end first
            shown["decisions"] = sorted(
                shown["decisions"], key=lambda decision: (decision["step"], decision["outcome"])
            )
        return shown
    return [lasting(each) for each in result] if isinstance(result, list) else result


def check_alike(one: Any, other: Any, at: str = "result") -> None:
    """Two results are the same but for what passes, and the last digits of numbers."""
    if at == "result":
        one, other = lasting(one), lasting(other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        assert one.keys() == other.keys(), at
        for name in one:
            check_alike(one[name], other[name], f"{at}.{name}")
    elif _is_list(one) and _is_list(other):
        assert len(one) == len(other), at
        for number, (a, b) in enumerate(zip(one, other, strict=True)):
            check_alike(a, b, f"{at}.{number}")
    elif isinstance(one, float):
        assert other == pytest.approx(one, abs=1e-4), at
    else:
        assert one == other, at


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)
