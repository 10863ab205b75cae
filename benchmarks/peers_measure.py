"""Two sides, one of them midstream, in turns: are their answers equal, and how long does each take?"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from benchmarks.common import spread
from benchmarks.peers_launch import Launch
from benchmarks.peers_process import Ran, Worker
from benchmarks.peers_protocol import Answer, Call
from benchmarks.peers_work import Item

SIDES = ("midstream", "peer")
# Seconds of rest before a side computes: the other's threads may spin for a moment after their last work.
REST_S = 0.3
# Of natural logarithms in float32. An adapter that is active one token too early is off by 0.17 and more.
TOLERANCE = 0.01


class Pair(NamedTuple):
    """Both sides' workers, loaded, and what they say of themselves."""

    midstream: Worker
    peer: Worker
    facts: dict[str, dict[str, Any]]

    def turn(self, number: int) -> list[tuple[str, Worker]]:
        """Both sides in the order of that round: each comes first every other time."""
        both = list(zip(SIDES, (self.midstream, self.peer), strict=True))
        return both if number % 2 == 0 else both[::-1]


@contextmanager
def started(midstream: Launch, peer: Launch) -> Iterator[Pair]:
    """Both sides, one loaded after the other."""
    with ExitStack() as stack:
        workers = []
        facts: dict[str, dict[str, Any]] = {}
        for name, launch in zip(SIDES, (midstream, peer), strict=True):
            worker = stack.enter_context(launch.worker())
            facts[name] = worker.load(launch.setup)
            workers.append(worker)
        yield Pair(workers[0], workers[1], facts)


# ---------------------------------------------------------------------- answers


@dataclass(slots=True)
class Equality:
    """How many answers were compared and what differed. `ends`: tokens after which an answer says nothing any more."""

    ends: frozenset[int]
    compared: int = 0
    differing: list[str] = field(default_factory=list)
    largest: float | None = None

    def note(self, calls: Sequence[Call], ours: Ran, theirs: Ran, where: str = "") -> None:
        """Compare two sides' answers to the same calls up to the token that ends an answer."""
        for call, one, other in zip(calls, ours.answers, theirs.answers, strict=True):
            self.compared += 1
            width = meaningful(one.tokens, self.ends)
            if one.tokens[:width] != other.tokens[:width]:
                self.differing.append(f"{call.adapter or 'the base model'} after {len(call.prompt)} tokens{where}")
            else:
                self._note_chances(one, other, width)

    @property
    def equal(self) -> bool:
        """Same tokens, and the same probabilities within what float32 explains."""
        return not self.differing and (self.largest or 0.0) <= TOLERANCE

    def as_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {"compared": self.compared, "differing": len(self.differing)}
        if self.differing:
            found["where"] = self.differing
        if self.largest is not None:
            found["largest_logprob_difference"] = self.largest
        return found

    def _note_chances(self, one: Answer, other: Answer, width: int) -> None:
        pairs = zip(one.logprobs[:width], other.logprobs[:width], strict=True)
        differences = [abs(a - b) for a, b in pairs]
        if differences:
            self.largest = max(self.largest or 0.0, *differences)


def meaningful(tokens: Sequence[int], ends: frozenset[int]) -> int:
    """Tokens of an answer before the one that ends it: peers treat that one, and what follows, in their own ways."""
    return next((i for i, token in enumerate(tokens) if token in ends), len(tokens))


def check(pair: Pair, groups: Sequence[Sequence[Call]], ends: frozenset[int]) -> Equality:
    """Ask both sides the same, with log-probabilities, from no KV on."""
    found = Equality(ends)
    for _, worker in pair.turn(0):
        worker.clear()
    for calls in groups:
        ran = [worker.run(calls, logprobs=True) for _, worker in pair.turn(0)]
        found.note(calls, ran[0], ran[1])
    return found


# ---------------------------------------------------------------------- seconds


def measure(pair: Pair, item: Item, rounds: int, equality: Equality | None) -> dict[str, Any]:
    """An item's row: medians over interleaved rounds, with all raw seconds. `equality` takes one round's answers."""
    raw: dict[str, list[float]] = {name: [] for name in SIDES}
    last: dict[str, Ran] = {}
    for number in range(rounds):
        for name, worker in pair.turn(number):
            seconds, last[name] = one_round(worker, item, first=number == 0)
            raw[name].append(seconds)
        if number == 0 and equality is not None:
            equality.note(item.calls, last["midstream"], last["peer"], f" ({item.work})")
    computed = {name: sum(answer.computed for answer in ran.answers) for name, ran in last.items()}
    return {**row(item.work, item.context, raw), "computed_tokens": computed, **item.notes}


def one_round(worker: Worker, item: Item, *, first: bool) -> tuple[float, Ran]:
    """Seconds of an item on one side, by that side's own clock."""
    if item.fresh or first:
        worker.clear()
    if item.warm:
        worker.warm(item.warm)
    time.sleep(REST_S)
    off = worker.run(item.less).seconds if item.less else 0.0
    ran = worker.run(item.calls)
    return (ran.seconds - off) / item.steps, ran


def start(launches: Sequence[Launch], prompt: tuple[int, ...], rounds: int) -> dict[str, Any]:
    """Seconds from a process's start to its first token, its model and adapters loaded. One process at a time."""
    raw: dict[str, list[float]] = {name: [] for name in SIDES}
    for number in range(rounds):
        both = list(zip(SIDES, launches, strict=True))
        for name, launch in both if number % 2 == 0 else both[::-1]:
            began = time.perf_counter()
            with launch.worker() as worker:
                worker.load(launch.setup)
                worker.run([Call(None, prompt, 1)])
                raw[name].append(time.perf_counter() - began)
    return row("start to first token", len(prompt), raw)


def row(work: str, context: int, raw: dict[str, list[float]]) -> dict[str, Any]:
    """The report's line. `ratio`: the peer's median seconds over midstream's; above 1, midstream is ahead."""
    middle = {name: statistics.median(values) for name, values in raw.items()}
    each = [theirs / ours for theirs, ours in zip(raw["peer"], raw["midstream"], strict=True)]
    return {
        "work": work,
        "context": context,
        "peer_s": middle["peer"],
        "midstream_s": middle["midstream"],
        "ratio": middle["peer"] / middle["midstream"],
        "spread": {**{name: spread(values) for name, values in raw.items()}, "ratio": spread(each)},
        "raw_s": raw,
    }


def peak_memory(pair: Pair, peer: Launch) -> dict[str, Any] | None:
    """Peak resident bytes of each side's processes so far; None where the system does not tell."""
    ours = pair.midstream.peak_bytes(children_only=False)
    theirs = pair.peer.peak_bytes(children_only=peer.wrapped)
    if ours is None or theirs is None:
        return None
    return {"peer_bytes": theirs, "midstream_bytes": ours, "ratio": theirs / ours}
