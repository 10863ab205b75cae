"""What selection gains: strategies compared offline on the same drawn candidates, with intervals."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import interval

Candidates = Sequence[Mapping[str, Any]]
Row = Mapping[str, Any]
Strategy = Callable[[Candidates, str], float]
SIZES = (1, 2, 4, 8)


def score_of(candidate: Mapping[str, Any], names: Sequence[str]) -> float:
    """Mean of some of a candidate's scores."""
    return float(np.mean([candidate["scores"][name] for name in names]))


def best_by(*names: str) -> Strategy:
    """The quality of the candidate with the highest mean of the named scores; the first of equal ones."""
    return lambda candidates, quality: max(candidates, key=lambda c: score_of(c, names))[quality]


def majority(*weights: str) -> Strategy:
    """The quality of the most frequent answer, each vote weighed by the mean of the named scores if any are named."""

    def choose(candidates: Candidates, quality: str) -> float:
        votes: dict[str, float] = defaultdict(float)
        for candidate in candidates:
            votes[candidate["key"]] += score_of(candidate, weights) if weights else 1.0
        winner = max(votes, key=lambda key: votes[key])
        return next(c for c in candidates if c["key"] == winner)[quality]

    return choose


def oracle(candidates: Candidates, quality: str) -> float:
    """The best that any selection could do."""
    return max(c[quality] for c in candidates)


def expected(candidates: Candidates, quality: str) -> float:
    """A candidate chosen at random."""
    return float(np.mean([c[quality] for c in candidates]))


def compare(rows: Sequence[Row], strategies: Mapping[str, Strategy], quality: str) -> dict[str, Any]:
    """Each strategy's mean quality at several numbers of candidates, and its gain over a random one of all, with 95 %
    intervals (bootstrap over the rows, paired)."""
    most = min(len(row["candidates"]) for row in rows)
    chance = np.array([expected(row["candidates"], quality) for row in rows])
    found: dict[str, Any] = {"n": len(rows), "quality": quality, "random": interval(chance), "strategies": {}}
    for name, strategy in strategies.items():
        found["strategies"][name] = {
            str(size): _figures(np.array([strategy(row["candidates"][:size], quality) for row in rows]), chance)
            for size in SIZES
            if size <= most
        }
    return found


def _figures(values: NDArray[np.float64], chance: NDArray[np.float64]) -> dict[str, Any]:
    gain = interval(values - chance)
    return {**interval(values), "gain": gain, "beats_random": gain["low"] > 0}


def within_auroc(rows: Sequence[Row], name: str, quality: str) -> float | None:
    """How often a score ranks the better of two candidates of one prompt higher (ties count half)."""
    wins, pairs = 0.0, 0
    for row in rows:
        for one in row["candidates"]:
            for other in row["candidates"]:
                if one[quality] > other[quality]:
                    a, b = one["scores"][name], other["scores"][name]
                    wins += 1.0 if a > b else 0.5 if a == b else 0.0
                    pairs += 1
    return wins / pairs if pairs else None
