"""Where a history that is rendered anew parts from the tokens that were computed, and why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Parting:
    """From token `at` on, a rendered history differs from the held one, so no KV after it can be reused."""

    at: int
    held_tokens: int
    rendered_tokens: int
    reason: str


def find_parting(
    held: Sequence[int], rendered: Sequence[int], decode: Callable[[Sequence[int]], str]
) -> Parting | None:
    """Compare held tokens with a rendered history; None where one begins with the other."""
    limit = min(len(held), len(rendered))
    at = next((i for i in range(limit) if held[i] != rendered[i]), limit)
    if at == limit:
        return None
    return Parting(at, len(held), len(rendered), _reason(held, rendered, at, decode))


def _reason(held: Sequence[int], rendered: Sequence[int], at: int, decode: Callable[[Sequence[int]], str]) -> str:
    ours, theirs = decode(held[at : at + 8]), decode(rendered[at : at + 8])
    if decode(held) == decode(rendered):
        cause = "the same text was split into other tokens"
    elif ours.strip() == theirs.strip() or ours.split() == theirs.split():
        cause = "white space was changed"
    else:
        cause = "the chat template renders the history differently"
    return f"at token {at} {cause}: {ours!r} was computed, {theirs!r} is asked for"
