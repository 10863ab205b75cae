"""The program of a chat's turns, written once for all sides, and whether what they answered is the same."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from benchmarks.turn_script import ANSWERABLE, CHECKS, GUARD, Call, Script, Turn
from benchmarks.turn_sides import Answer, Side

# `ask`: the rewriter beside the guard. `checks`: three at once.
PHASES = ("ask", "answerability", "answer", "checks")


class Done(NamedTuple):
    """A call with its answer and the wall seconds that the caller waited for it."""

    call: Call
    answer: Answer
    seconds: float


@dataclass(slots=True)
class Played:
    """What a side did with a script: its calls in order, and an entry a turn in each list."""

    calls: list[Done] = field(default_factory=list)
    phases: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in PHASES})
    context_tokens: list[int] = field(default_factory=list)
    kv_bytes: list[int] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return sum(map(sum, self.phases.values()))

    @property
    def answers(self) -> list[tuple[int, ...]]:
        """The base model's, one a turn."""
        return [done.answer.tokens for done in self.base().calls]

    def base(self) -> Played:
        """The base model's calls alone."""
        return Played([done for done in self.calls if done.call.adapter is None])

    @property
    def computed_tokens(self) -> int:
        """Prompt tokens whose KV was computed for these calls."""
        return sum(done.answer.computed for done in self.calls)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.phases[name].append(time.perf_counter() - started)


async def play(side: Side, script: Script, answers: Sequence[tuple[int, ...]] | None = None) -> Played:
    """Play a whole chat with no KV at its start.

    The chat goes on with `answers`, one a turn, so that all sides read the same; without them, with the side's own.
    Each side computes its own answer all the same.
    """
    await side.fresh()
    played = Played()
    held: tuple[int, ...] = ()
    for number, turn in enumerate(script.turns):
        own = await _open_turn(side, script, turn, held, played)
        kept = own if answers is None else answers[number]
        held = (*held, *turn.given, *turn.header, *kept, *turn.closing)
        with played.phase("checks"):
            await _ask(side, played, *_checks(script, turn, held))
        played.context_tokens.append(len(held))
        played.kv_bytes.append(await side.kv_bytes())
    return played


async def _open_turn(side: Side, script: Script, turn: Turn, held: tuple[int, ...], played: Played) -> tuple[int, ...]:
    """From the question to the base model's answer."""
    # The question is rewritten and guarded before anything is retrieved for it, so it stands there without passages.
    asked = (*held, *turn.asked)
    with played.phase("ask"):
        await _ask(side, played, script.rewrite(asked), script.label(GUARD, asked))
    given = (*held, *turn.given)
    with played.phase("answerability"):
        await _ask(side, played, script.label(ANSWERABLE, given))
    with played.phase("answer"):
        (answer,) = await _ask(side, played, script.answer(given, turn))
    return answer.tokens


def _checks(script: Script, turn: Turn, held: tuple[int, ...]) -> list[Call]:
    required = (*held, *turn.required)
    return [script.label(name, required if name == "requirement_check" else held) for name in CHECKS]


async def _ask(side: Side, played: Played, *calls: Call) -> list[Answer]:
    """Several calls at once."""

    async def one(call: Call) -> Done:
        started = time.perf_counter()
        answer = await side.run(call)
        return Done(call, answer, time.perf_counter() - started)

    done = await asyncio.gather(*map(one, calls))
    played.calls += done
    return [d.answer for d in done]


async def recomputed(side: Side, played: Played) -> Played:
    """Ask all calls of a chat again, one by one."""
    again = Played()
    for done in played.calls:
        await _ask(side, again, done.call)
    return again


def differences(one: Played, other: Played) -> list[str]:
    """Which answers to the same calls differ, in words."""
    found: list[str] = []
    for number, (a, b) in enumerate(zip(one.calls, other.calls, strict=True)):
        assert a.call == b.call, "the sides were not asked the same"
        if a.answer.tokens != b.answer.tokens:
            pairs = enumerate(zip(a.answer.tokens, b.answer.tokens, strict=False))
            at = next(i for i, pair in pairs if len({*pair}) > 1)
            found.append(f"call {number} ({a.call.adapter or 'base answer'}) from token {at} on")
    return found


class Comparison:
    """Counts of answers that were compared and of those that differ. `strict` ends the run where an engine's does."""

    def __init__(self, *, strict: bool) -> None:
        self.counts: dict[str, dict[str, int]] = {}
        self._strict = strict

    def note(self, side: str, reference: Played, played: Played) -> None:
        """Compare what a side answered with the aLoRA side's reference. Raises SystemExit, naming the calls."""
        found = differences(reference, played)
        counts = self.counts.setdefault(side, {"compared": 0, "differing": 0})
        counts["compared"] += len(reference.calls)
        counts["differing"] += len(found)
        # PEFT computes in another order, so a near tie of its own may fall otherwise.
        if found and self._strict and side != "peft":
            raise SystemExit(f"the answers of {side} differ from the reference's: {'; '.join(found)}")
