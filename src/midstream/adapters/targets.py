"""Which linear layers a PEFT configuration adapts, with what rank and scale: PEFT's matching rules."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

# Far above the layers of any model; bounds the time that matching can take.
_MAX_PATTERNS = 10_000
_NO_HEAD = "lm_head"

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class TargetSpec:
    """One adapted linear layer: y += scale · B A x with rank rows in A."""

    module: str
    rank: int
    scale: float


class TargetReader:
    """Finds the targets of one configuration; `report` receives each violation, and is the only sign of one."""

    def __init__(self, config: Mapping[str, Any], report: Report) -> None:
        self._config = config
        self._report = report

    def read(self, modules: Iterable[str]) -> tuple[TargetSpec, ...]:
        """The targets among a base model's linear layers, in their order."""
        rank = self._positive(self._config.get("r", 8), "r", whole=True)
        alpha = self._positive(self._config.get("lora_alpha", 8), "lora_alpha", whole=False)
        ranks = self._patterns("rank_pattern", whole=True)
        alphas = self._patterns("alpha_pattern", whole=False)
        by_root = self._switch("use_rslora")
        targets: list[TargetSpec] = []
        for module in self._chosen(modules):
            r = int(_first(ranks, module, rank))
            a = _first(alphas, module, alpha)
            targets.append(TargetSpec(module, r, a / math.sqrt(r) if by_root else a / r))
        return tuple(targets)

    # ------------------------------------------------------------------ which modules

    def _chosen(self, modules: Iterable[str]) -> list[str]:
        wanted = self._config.get("target_modules")
        is_target = self._matcher("target_modules", wanted)
        is_excluded = self._matcher("exclude_modules", self._config.get("exclude_modules"))
        in_layer = self._layer_filter(by_expression=isinstance(wanted, str))
        # PEFT takes a module that is listed with its whole path whatever its layer.
        whole = frozenset(name for name in wanted if isinstance(name, str)) if isinstance(wanted, list) else frozenset()
        chosen = [m for m in modules if is_target(m) and not is_excluded(m) and (m in whole or in_layer(m))]
        if not chosen:
            self._report(f"target_modules {shown(wanted)} match no linear layer of this base model")
        return chosen

    def _matcher(self, field: str, wanted: Any) -> Callable[[str], bool]:
        """A text is an expression for the whole path, a list has names of modules or ends of their paths."""
        if wanted is None:
            return _never
        if isinstance(wanted, str) and field == "target_modules" and wanted.lower() == "all-linear":
            return lambda module: module != _NO_HEAD
        if isinstance(wanted, str):
            pattern = self._expression(wanted, wanted, field)
            return _never if pattern is None else lambda module: pattern.fullmatch(module) is not None
        if not isinstance(wanted, list) or not all(isinstance(name, str) for name in wanted):
            self._report(f"{field} is {shown(wanted)}, not a text or a list of texts")
            return _never
        names = frozenset(wanted)
        return lambda module: any(end in names for end in _ends(module))

    def _layer_filter(self, *, by_expression: bool) -> Callable[[str], bool]:
        """layers_to_transform and layers_pattern: whether a module is inside one of the chosen layers."""
        layers, names = self._layers(), self._layer_names()
        if by_expression and not (layers is None and self._config.get("layers_pattern") is None):
            self._report("layers_to_transform and layers_pattern need target_modules to be a list")
        if names and layers is None:
            self._report("layers_pattern needs layers_to_transform")
        if not layers:
            return _always
        # PEFT does not group the name, so that an alternative in it may match without a number.
        prefixes = [rf"(?:^|.*?\.){name}\.(?P<layer>\d+)\." for name in names] or [r".*?\.[^.]*\.(?P<layer>\d+)\."]
        patterns = [self._expression(p, p, "layers_pattern") for p in prefixes]

        def inside(module: str) -> bool:
            found = next((m for p in patterns if p is not None and (m := p.match(module))), None)
            number = None if found is None else found["layer"]
            return number is not None and int(number) in layers

        return inside

    def _layers(self) -> frozenset[int] | None:
        value = self._config.get("layers_to_transform")
        if value is None:
            return None
        layers = value if isinstance(value, list) else [value]
        if not all(is_int(layer) for layer in layers):
            self._report(f"layers_to_transform is {shown(value)}, not a list of layer numbers")
            return None
        return frozenset(layers)

    def _layer_names(self) -> list[str]:
        value = self._config.get("layers_pattern")
        if value is None or value == "":
            return []
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            self._report(f"layers_pattern is {shown(value)}, not a text or a list of texts")
            return []
        return names

    # ------------------------------------------------------------------ ranks and scales

    def _patterns(self, field: str, *, whole: bool) -> list[tuple[re.Pattern[str], float]]:
        """Expressions for the end of a module's path, in the order in which they are tried, each with its value."""
        value = self._config.get(field)
        if value is None:
            return []
        if not isinstance(value, dict):
            self._report(f"{field} is {shown(value)}, not an object")
            return []
        if len(value) > _MAX_PATTERNS:
            self._report(f"{field} has {len(value)} entries, more than {_MAX_PATTERNS}")
            return []
        found: list[tuple[re.Pattern[str], float]] = []
        for key, number in value.items():
            checked = self._positive(number, f"{field}[{shown(key)}]", whole=whole)
            pattern = self._expression(rf"(.*\.)?({key})$", key, field)
            if pattern is not None:
                found.append((pattern, checked))
        return found

    def _positive(self, value: Any, field: str, *, whole: bool) -> float:
        is_number = is_int(value) or (not whole and isinstance(value, float))
        if not is_number or not 0 < value < 1e6:
            self._report(f"{field} is {shown(value)}, not a positive {'whole number' if whole else 'number'}")
            return 1.0
        return float(value)

    def _switch(self, field: str) -> bool:
        value = self._config.get(field)
        if value is not None and not isinstance(value, bool):
            self._report(f"{field} is {shown(value)}, not true or false")
        return value is True

    def _expression(self, pattern: str, written: str, field: str) -> re.Pattern[str] | None:
        try:
            return re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            self._report(f"{field}: {shown(written)} is not a regular expression: {error}")
            return None


def is_int(value: Any) -> bool:
    """Whether a JSON value is a whole number; true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def shown(value: Any) -> str:
    """A JSON value as it may stand in a message: short, and in ASCII."""
    try:
        text = json.dumps(value)
    except (RecursionError, ValueError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= 120 else text[:117] + "..."


def _first(patterns: list[tuple[re.Pattern[str], float]], module: str, default: float) -> float:
    return next((value for pattern, value in patterns if pattern.match(module)), default)


def _ends(module: str) -> Iterable[str]:
    """The path itself, then what is left after each dot."""
    yield module
    for position, letter in enumerate(module):
        if letter == ".":
            yield module[position + 1 :]


def _never(module: str) -> bool:
    return False


def _always(module: str) -> bool:
    return True
