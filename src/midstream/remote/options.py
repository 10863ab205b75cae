"""The probability of each option of a choice, from logprobs, for servers that do not send it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from midstream.types import TokenLogprob

# A share below this may count as none: what is left out changes the others by no more.
_NEGLIGIBLE = 1e-6


@dataclass(frozen=True, slots=True)
class Parting:
    """Where options part: after the tokens of `stem`, each goes on with a token of its own."""

    stem: tuple[int, ...]
    options: Mapping[int, str]


def find_parting(options: Mapping[str, Sequence[int]]) -> Parting | None:
    """The one place where all options (with their tokens) part. None where there are several, or one option ends
    where others go on."""
    each = list(options.values())
    at = next((i for i, column in enumerate(zip(*each, strict=False)) if len(set(column)) > 1), None)
    if at is None:
        return None
    heads = {tokens[at]: option for option, tokens in options.items()}
    return Parting(tuple(each[0][:at]), heads) if len(heads) == len(options) else None


def shares(parting: Parting, tokens: Sequence[int], logprobs: Sequence[TokenLogprob]) -> dict[str, float] | None:
    """Probabilities of the options, summing to 1. None where the answer took another way to its text, or where an
    option that may matter is not among the alternatives."""
    at = len(parting.stem)
    if tuple(tokens[:at]) != parting.stem or len(logprobs) <= at or tokens[at] not in parting.options:
        return None
    known = {one.token_id: one.logprob for one in (*logprobs[at].top, logprobs[at])}
    weights = {option: math.exp(known[head]) for head, option in parting.options.items() if head in known}
    mass = sum(weights.values())
    missing = len(parting.options) - len(weights)
    if not mass or missing * math.exp(min(known.values())) > _NEGLIGIBLE * mass:
        return None
    return {option: weights.get(option, 0.0) / mass for option in parting.options.values()}
