"""A run: what fits, what is done in which order, and the report that it fills."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from midstream.bench.adapters import Adapters, load_adapters
from midstream.bench.contexts import SHORTEST
from midstream.bench.machine import busy_warnings, load_average, machine
from midstream.bench.model import ModelFacts
from midstream.bench.report import Report, Row
from midstream.bench.work import FREE_TOKENS, STEPS, STREAMS, Samples, Work
from midstream.errors import InputError
from midstream.session import Engine

# A decode step takes about as long as reading so many tokens: close enough to tell the time left.
_STEP_COST = 32


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of the run that is done or not. `cost`: in tokens of prefill, for telling the time left."""

    text: str
    cost: int
    run: Callable[[], object]


class Run:
    """A run that is ready to be measured: `report` fills as its `pieces` are done, in their order."""

    def __init__(
        self, engine: Engine, contexts: Sequence[int], rounds: int, *, rank: int | None = None, load_before: float = 0.0
    ) -> None:
        """Load adapters, see what fits, and measure the machine. `load_before`: its load average when all began.

        Raises InputError where no context fits, a context or `rounds` is too small or `rank` is too large.
        """
        if rounds < 1 or not contexts or min(contexts) < SHORTEST:
            raise InputError(f"give at least one round and contexts of at least {SHORTEST} tokens")
        facts = ModelFacts.of(engine)
        adapters = load_adapters(engine, facts, rank)
        self._engine = engine
        self._facts = facts
        self._work = Work(engine, facts, adapters)
        self._slots = engine.stats().kv_total_bytes // facts.token_bytes
        left_out: list[dict[str, Any]] = []
        fitting = [tokens for tokens in sorted(set(contexts)) if self._fits(tokens, left_out)]
        if not fitting:
            raise InputError(
                "no context fits: " + "; ".join(f"{each['context']}: {each['reason']}" for each in left_out)
            )
        self._streams = {tokens: self._fitting_streams(tokens, left_out) for tokens in fitting}
        self.report = Report(
            model={
                "name": facts.name,
                "dtype": facts.dtype_name,
                "weights": facts.weights,
                "kv": facts.kv,
                "device": str(facts.device),
            },
            machine=machine(facts.device, facts.dtype),
            adapters=adapters.as_dict(),
            rounds=rounds,
            left_out=left_out,
            rows=[_row(tokens, facts, adapters) for tokens in fitting],
        )
        self.report.machine["load_average"] = load_before
        self.pieces = self._plan()

    def finish(self, ended: str | None = None) -> None:
        """Note how the run ended, and whether the machine was busy."""
        self.report.ended = ended
        found = self.report.machine
        found["load_average_after"] = load_average()
        self.report.warnings = busy_warnings(
            found["load_average"],
            found["load_average_after"],
            cores=int(found["cores"] or 1),
            threads=int(found["threads"]),
        )

    # ------------------------------------------------------------------ what fits

    def _fits(self, tokens: int, left_out: list[dict[str, Any]]) -> bool:
        longest, slots = self._work.needs(tokens)
        most = self._engine.aio.max_context_tokens
        reason = None
        if slots > self._slots:
            reason = self._too_little_kv(slots)
        elif longest > most:
            reason = f"it takes {longest} tokens, and the model's context is {most}"
        if reason is not None:
            left_out.append({"what": "all", "context": tokens, "reason": reason})
        return reason is None

    def _fitting_streams(self, tokens: int, left_out: list[dict[str, Any]]) -> int:
        slots = self._work.stream_slots(tokens)
        if slots <= self._slots:
            return STREAMS
        left_out.append({"what": f"{STREAMS} streams", "context": tokens, "reason": self._too_little_kv(slots)})
        return 1

    def _too_little_kv(self, slots: int) -> str:
        return (
            f"it takes {_mib(slots * self._facts.token_bytes)} MiB of KV, and there are "
            f"{self._slots * self._facts.token_bytes // 1024**2}"
        )

    # ------------------------------------------------------------------ the plan

    def _plan(self) -> list[Piece]:
        """A round at the smallest context that is not kept, for the first use of every kernel; then row by row."""
        first = self.report.rows[0].context
        pieces = [Piece("first use", _calls_cost(first), functools.partial(self._work.calls, first))]
        for row in self.report.rows:
            pieces += self._pieces(row)
        return pieces

    def _pieces(self, row: Row) -> list[Piece]:
        tokens, streams = row.context, self._streams[row.context]
        calls = functools.partial(self._work.calls, tokens)
        decode = functools.partial(self._work.decode, tokens, streams)
        read = functools.partial(self._work.read_streams, tokens, streams)
        return [
            *self._rounds(row, "calls", _calls_cost(tokens), calls),
            Piece(f"{tokens} tokens, reading", streams * tokens, read),
            *self._rounds(row, "decoding", (1 + (streams > 1)) * STEPS * _STEP_COST, decode),
        ]

    def _rounds(self, row: Row, what: str, cost: int, measure: Callable[[], Samples]) -> list[Piece]:
        """As many rounds as asked for; a round is kept when it is whole."""
        rounds = self.report.rounds
        return [
            Piece(f"{row.context} tokens, {what}, round {number} of {rounds}", cost, lambda: row.add(measure()))
            for number in range(1, rounds + 1)
        ]


def _calls_cost(tokens: int) -> int:
    return 3 * tokens + 2 * FREE_TOKENS * _STEP_COST


def _row(tokens: int, facts: ModelFacts, adapters: Adapters) -> Row:
    return Row(tokens, len(adapters.alora[0].invocation_tokens), facts.step_bytes(tokens + STEPS // 2))


def _mib(size: int) -> int:
    """Rounded up, so that what is named is enough."""
    return -(-size // 1024**2)
