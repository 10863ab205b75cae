"""What a library holds, told from its folders: contract, invocation, figures, data and licence of each adapter."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from midstream.training.card import in_table
from midstream.training.tasks import TASKS

FIGURES_FILE = "evaluation.json"
# The figures that a catalogue shows, the most telling of a kind of task first.
_SHOWN = ("recall_at_5", "rouge_l", "auroc", "accuracy", "ece")


@dataclass(frozen=True, slots=True)
class Entry:
    """One adapter of a library. `figures`: title of an evaluation → its report; `path`: model folder and its own."""

    name: str
    path: str
    task: str
    answer: str
    invocation: str
    kind: str
    rank: int
    targets: tuple[str, ...]
    licence: str
    figures: Mapping[str, Mapping[str, Any]]


def read_entries(root: Path) -> list[Entry]:
    """The adapters in a folder, by name."""
    return [read_entry(path.parent) for path in sorted(root.glob("*/adapter_config.json"))]


def read_entry(folder: Path) -> Entry:
    """Read an adapter's folder; what a file does not tell is left empty."""
    config, sidecar = _json(folder / "adapter_config.json"), _json(folder / "midstream.json")
    contract = folder / "io.yaml"
    content = yaml.safe_load(contract.read_text(encoding="utf-8")) if contract.is_file() else {}
    return Entry(
        name=folder.name,
        path=f"{folder.resolve().parent.name}/{folder.name}",
        task=str(sidecar.get("task", folder.name)),
        answer=_answer(json.loads(content.get("response_format") or "null")),
        invocation=str(sidecar.get("invocation_text", "")),
        kind="alora" if config.get("alora_invocation_tokens") else "lora",
        rank=int(config.get("r", 0)),
        targets=tuple(config.get("target_modules") or ()),
        licence=str(_front(folder / "README.md").get("license_name", "")),
        figures=_json(folder / FIGURES_FILE),
    )


def headline(entry: Entry) -> str:
    """The most telling figures of the first evaluation, beside the base model's where it has them."""
    for report in entry.figures.values():
        arms = report["arms"]
        own, base = arms.get(entry.kind, {}), arms.get("base_constrained", {})
        names = [name for name in _SHOWN if name in own][:2]
        if entry.task in TASKS and TASKS[entry.task].kind == "scale":
            names = ["ece", "auroc"]
        return ", ".join(f"{name} {own[name]['value']:.2f} (base {base[name]['value']:.2f})" for name in names)
    return ""


def markdown(entries: Sequence[Entry]) -> str:
    """The catalogue: one table of adapters, and one of their figures with intervals."""
    lines = ["| adapter | answers | invocation | kind | rank | target modules | licence |", "|---" * 7 + "|"]
    for e in entries:
        cells = [f"[{e.name}]({e.path}/README.md)", e.answer, in_table(e.invocation), e.kind, str(e.rank)]
        lines.append(f"| {' | '.join([*cells, _modules(e.targets), e.licence])} |")
    lines += [
        "",
        "| adapter | rows | n | figure | base, asked | base, held | adapter | best shortcut |",
        "|---" * 8 + "|",
    ]
    lines += [line for entry in entries for line in _figures(entry)]
    return "\n".join(lines)


def _figures(entry: Entry) -> list[str]:
    lines: list[str] = []
    for title, report in entry.figures.items():
        arms = report["arms"]
        own = arms.get(entry.kind, {})
        for name in (name for name in _SHOWN if name in own):
            base, held = (cell(arms.get(arm, {}).get(name)) for arm in ("base", "base_constrained"))
            shortcut = _best([(arm, arms[arm][name]) for arm in _SHORTCUTS if name in arms.get(arm, {})], name)
            cells = [entry.name, title, str(report["n"]), name, base, held, cell(own[name]), shortcut]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


_SHORTCUTS = ("tfidf", "word_overlap", "last_turn")


def _best(found: Sequence[tuple[str, Mapping[str, float]]], name: str) -> str:
    if not found:
        return "-"
    chosen = (min if name == "ece" else max)(found, key=lambda pair: pair[1]["value"])
    return f"{chosen[0]} {cell(chosen[1])}"


def cell(figure: Mapping[str, float] | None) -> str:
    """A figure with its interval."""
    return "-" if figure is None else f"{figure['value']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]"


def _answer(schema: Mapping[str, Any] | None) -> str:
    if schema is None:
        return "plain text"
    if options := schema.get("enum"):
        return (
            " / ".join(f"`{json.dumps(o)}`" for o in options) if len(options) < 6 else f"{options[0]} to {options[-1]}"
        )
    return "`{" + ", ".join(f'"{key}"' for key in schema.get("properties", {})) + "}`"


def _modules(names: Sequence[str]) -> str:
    return ", ".join(name.removesuffix("_proj") for name in names)


def _front(card: Path) -> Mapping[str, Any]:
    parts = card.read_text(encoding="utf-8").split("---\n") if card.is_file() else []
    return yaml.safe_load(parts[1]) if len(parts) > 2 and not parts[0] else {}


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
