"""The means of patching: a seam is a function of vLLM with the parameters that we rely on. Nothing here knows vLLM."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

_MARK = "__midstream__"


@dataclass(frozen=True, slots=True)
class Seam:
    """One function that is replaced. `make` gets the stock function and gives ours; its docstring says what for.

    `where` is "module:name" or "module:class.name". `leading` are its first parameters, `others` are parameters that it
    must have somewhere. `bound_by_name`: other modules have imported the function.
    """

    where: str
    leading: tuple[str, ...]
    make: Callable[[Any], Any]
    others: tuple[str, ...] = ()
    bound_by_name: bool = False

    def problem(self) -> str | None:
        """Why this seam does not fit, or None."""
        try:
            stock = self._stock()
            parameters = list(inspect.signature(stock).parameters)
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            return f"{self.where} is not there: {error}"
        if tuple(parameters[: len(self.leading)]) != self.leading:
            return f"{self.where} takes ({', '.join(parameters)}), expected ({', '.join(self.leading)}, ...)"
        lacking = [name for name in self.others if name not in parameters]
        return f"{self.where} does not take {', '.join(lacking)}" if lacking else None

    def prepare(self) -> Callable[[], None]:
        """Make the replacement; what is returned puts it in, and cannot fail."""
        owner, name = self._owner()
        stock = self._stock()
        ours = self.make(stock)
        setattr(ours, _MARK, True)
        places: list[tuple[Any, str]] = [(owner, name)]
        if self.bound_by_name:
            places += [(module, name) for module in _modules() if module.__dict__.get(name) is stock]

        def put() -> None:
            for place, attribute in places:
                setattr(place, attribute, ours)

        return put

    def is_in(self) -> bool:
        owner, name = self._owner()
        return hasattr(getattr(owner, name), _MARK)

    def _owner(self) -> tuple[Any, str]:
        module, _, path = self.where.partition(":")
        owner: Any = import_module(module)
        *classes, name = path.split(".")
        for part in classes:
            owner = getattr(owner, part)
        return owner, name

    def _stock(self) -> Any:
        owner, name = self._owner()
        return getattr(owner, name)


def put_in(seams: Sequence[Seam]) -> list[str]:
    """Replace all of them, or none: gives the problems that are in the way. Does nothing where they are in already."""
    problems = [problem for seam in seams if (problem := seam.problem())]
    if problems or all(seam.is_in() for seam in seams):
        return problems
    ready = [seam.prepare() for seam in seams]
    for put in ready:
        put()
    return []


def _modules() -> list[Any]:
    return [module for name, module in list(sys.modules.items()) if name.startswith("vllm.") and module is not None]
