"""Measurements kept as they come, and the figures made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from midstream.bench.adapters import FANOUT
from midstream.bench.figures import Spread, spread
from midstream.bench.work import FREE_TOKENS, STREAMS, Samples


@dataclass(slots=True)
class Row:
    """One context: `raw` measurements by name, a value for each whole round.

    `invocation`: tokens of the called adapter's. `step_bytes`: what a decode step reads, weights and KV once.
    """

    context: int
    invocation: int
    step_bytes: int
    raw: dict[str, list[float]] = field(default_factory=dict)

    def add(self, samples: Samples) -> None:
        """Keep a whole round."""
        for name, value in samples.items():
            self.raw.setdefault(name, []).append(value)

    def figures(self) -> dict[str, Spread]:
        """Median and quartiles of every figure whose measurements are there."""
        return {figure.name: found for figure in FIGURES if (found := figure.of(self)) is not None}

    def shares(self) -> dict[str, float]:
        """The calls' ratios as parts of their bounds, both the medians."""
        found = self.figures()
        return {
            kind: found[f"{kind}_ratio"]["median"] / found[f"{kind}_bound"]["median"]
            for kind in ("label", "free")
            if f"{kind}_ratio" in found and f"{kind}_bound" in found
        }


@dataclass(frozen=True, slots=True)
class FigureOf:
    """A figure: of each round's measurements `keys`, through `value` (which gets the row too), and how it is shown."""

    name: str
    label: str
    keys: tuple[str, ...]
    value: Callable[..., float]
    digits: int = 0

    def of(self, row: Row) -> Spread | None:
        """None where a measurement is missing."""
        values = [self.value(row, *each) for each in zip(*(row.raw.get(key, ()) for key in self.keys), strict=False)]
        return spread(values) if values else None

    def shown(self, found: Spread | None) -> str:
        """Median (quartiles)."""
        if found is None:
            return "–"
        median, q1, q3 = (f"{found[key]:.{self.digits}f}" for key in ("median", "q1", "q3"))
        return f"{median} ({q1}–{q3})"


def _ms(row: Row, seconds: float) -> float:
    return seconds * 1e3


def _ratio(row: Row, a: float, b: float) -> float:
    return a / b


def _free_bound(row: Row, all_: float, last: float, step: float) -> float:
    """The bound where an answer has FREE_TOKENS: all steps but the first cost both sides the same."""
    rest = (FREE_TOKENS - 1) * step
    return (all_ + rest) / (last + rest)


def _prefill(row: Row, seconds: float) -> float:
    return (row.context + row.invocation) / seconds


def _over_reading(row: Row, seconds: float, bytes_per_s: float) -> float:
    return seconds * bytes_per_s / row.step_bytes


FIGURES = (
    FigureOf("prefill_tokens_per_s", "prefill, tokens/s", ("base_all_s",), _prefill),
    FigureOf("step_ms", "decode step, ms", ("step_s",), _ms, 1),
    FigureOf("step_over_reading", "  / reading weights + KV", ("step_s", "read_bytes_per_s"), _over_reading, 2),
    FigureOf("streams_tokens_per_s", f"{STREAMS} streams, tokens/s", ("streams_step_s",), lambda row, s: STREAMS / s),
    FigureOf("label_lora_ms", "label: LoRA, ms", ("label_lora_s",), _ms),
    FigureOf("label_alora_ms", "  aLoRA, ms", ("label_alora_s",), _ms, 1),
    FigureOf("label_ratio", "  LoRA / aLoRA", ("label_lora_s", "label_alora_s"), _ratio, 1),
    FigureOf("label_bound", "  bound", ("base_all_s", "base_last_s"), _ratio, 1),
    FigureOf("free_lora_ms", f"{FREE_TOKENS} tokens: LoRA, ms", ("free_lora_s",), _ms),
    FigureOf("free_alora_ms", "  aLoRA, ms", ("free_alora_s",), _ms),
    FigureOf("free_ratio", "  LoRA / aLoRA", ("free_lora_s", "free_alora_s"), _ratio, 2),
    FigureOf("free_bound", "  bound", ("base_all_s", "base_last_s", "step_s"), _free_bound, 2),
    FigureOf("fanout_ms", f"{FANOUT} adapters at once, ms", ("fanout_s",), _ms, 1),
    FigureOf("fanout_ratio", "  / one", ("fanout_s", "label_alora_s"), _ratio, 2),
    FigureOf("kv_ratio", "  KV bytes / one's", ("kv_all_bytes", "kv_one_bytes"), _ratio, 3),
)


@dataclass(slots=True)
class Report:
    """A run: what was measured where, and the rows as they come.

    `left_out`: what does not fit, each with its `context`, `what` and `reason`. `ended`: why the run ended early.
    """

    model: Mapping[str, Any]
    machine: dict[str, Any]
    adapters: Mapping[str, Any]
    rounds: int
    left_out: list[dict[str, Any]]
    rows: list[Row]
    warnings: list[str] = field(default_factory=list)
    ended: str | None = None

    @property
    def measured(self) -> list[Row]:
        """The rows of which at least one round is whole."""
        return [row for row in self.rows if row.raw]

    def as_dict(self) -> dict[str, Any]:
        """All of it for programs: figures with quartiles, and the raw measurements they were made of."""
        return {
            "model": dict(self.model),
            "machine": self.machine,
            "adapters": dict(self.adapters),
            "rounds": self.rounds,
            "ended_early": self.ended,
            "warnings": self.warnings,
            "left_out": self.left_out,
            "rows": [
                {
                    "context": row.context,
                    "invocation_tokens": row.invocation,
                    "step_bytes": row.step_bytes,
                    "figures": row.figures(),
                    "share_of_bound": row.shares(),
                    "raw": row.raw,
                }
                for row in self.measured
            ],
        }
