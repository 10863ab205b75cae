"""Adapters that a request's own output may invoke: made ready, and refused where they never could be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import TYPE_CHECKING

from midstream.adapters.activation import find_last
from midstream.errors import InputError, InvocationError
from midstream.types import SamplingParams

if TYPE_CHECKING:
    from midstream.adapters import Adapter
    from midstream.engine.constraints import Matcher


@dataclass(frozen=True, slots=True, eq=False)
class Callee:
    """An aLoRA that may be called, and how its answer is decoded. `matcher` makes one matcher for each call."""

    adapter: Adapter
    params: SamplingParams
    closing: tuple[int, ...]
    matcher: Callable[[], Matcher] | None

    @property
    def name(self) -> str:
        return self.adapter.spec.name

    @property
    def invocation(self) -> tuple[int, ...]:
        return self.adapter.spec.invocation_tokens


def find_called(callees: Sequence[Callee], output: Sequence[int], start: int) -> Callee | None:
    """The callee with whose invocation output[start:] ends; of several the one with the longest."""
    matching = (callee for callee in callees if _ends_with(output, start, callee.invocation))
    return max(matching, key=lambda callee: len(callee.invocation), default=None)


def check_callable(adapter: Adapter, closing: Sequence[int], max_tokens: int) -> None:
    """Raise InputError for a plain LoRA, and for an aLoRA for whose answer an output has no room."""
    spec = adapter.spec
    if spec.kind == "lora":
        raise InputError(
            f"adapter {spec.name} is a plain LoRA and cannot be invoked by the model's output: it would have to read "
            "everything anew; train it as an activated LoRA, or ask it in a request of its own"
        )
    least = len(spec.invocation_tokens) + 1 + len(closing)
    if least > max_tokens:
        raise InputError(
            f"adapter {spec.name} can never answer in the model's output: its invocation, one token and the closing "
            f"are {least} tokens, but max_tokens is {max_tokens}"
        )


def check_reachable(callees: Sequence[Callee], ends: frozenset[int]) -> None:
    """Raise InvocationError for a callee that no output could ever call. `ends` are the tokens that end an output."""
    for callee in callees:
        end = next((token for token in callee.invocation if token in ends), None)
        if end is not None:
            raise InvocationError(
                f"adapter {callee.name} can never be invoked by the model's output: its invocation has the "
                f"end-of-sequence token {end}, with which the output ends; set ignore_eos, without a constraint"
            )
    for one, other in permutations(callees, 2):
        if one.invocation == other.invocation:
            raise InvocationError(f"adapters {one.name} and {other.name} have the same invocation: offer one of them")
        if find_last(other.invocation[:-1], one.invocation) is not None:
            raise InvocationError(
                f"adapter {other.name} can never be invoked by the model's output: {one.name} is before "
                f"{list(other.invocation)} is whole; offer one of them"
            )


def _ends_with(output: Sequence[int], start: int, invocation: Sequence[int]) -> bool:
    width = len(invocation)
    return len(output) - start >= width and tuple(output[-width:]) == tuple(invocation)
