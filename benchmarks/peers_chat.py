"""The five-turn RAG chat of benchmarks/turn.py, played on two workers in turns."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks import turn_script
from benchmarks.peers_measure import REST_S, SIDES, Equality, Pair, meaningful, row
from benchmarks.peers_process import Worker
from benchmarks.peers_protocol import Call, Label
from benchmarks.peers_work import make_label
from benchmarks.turn_play import Played, differences, play
from benchmarks.turn_script import Lengths, Script, read_rows, write_script
from benchmarks.turn_sides import Answer
from midstream.models.chat import ChatTokenizer
from midstream.types import AdapterInfo

TURNS = 5


class RemoteSide:
    """A worker as a side of the chat: calls that are made at once go to it in one message."""

    def __init__(self, name: str, worker: Worker, label: Callable[[Sequence[str]], Label | None]) -> None:
        self.name = name
        self._worker = worker
        self._label = label
        self._waiting: list[tuple[Call, asyncio.Future[Answer]]] = []

    async def fresh(self) -> None:
        self._worker.clear()

    async def run(self, call: turn_script.Call) -> Answer:
        asked = Call(call.adapter, call.prompt, call.tokens, self._label(call.options))
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Answer] = loop.create_future()
        if not self._waiting:
            # When the loop comes to it, all calls of this moment are there.
            loop.call_soon(self._send)
        self._waiting.append((asked, answer))
        return await answer

    async def kv_bytes(self) -> int:
        return 0  # the workers do not tell

    def _send(self) -> None:
        """Nothing else is to do meanwhile, so the loop may stand still."""
        waiting, self._waiting = self._waiting, []
        try:
            ran = self._worker.run([call for call, _ in waiting])
        except Exception as error:
            for _, answer in waiting:
                answer.set_exception(error)
            return
        for (_, answer), found in zip(waiting, ran.answers, strict=True):
            answer.set_result(Answer(found.tokens, found.computed))


def scripts(
    folder: Path, chat: ChatTokenizer, infos: Mapping[str, AdapterInfo], count: int, max_tokens: int
) -> list[Script]:
    """The first conversations of that folder that are long enough and fit the context."""
    rows = (row for row in read_rows(folder) if len(row["turns"]) >= TURNS)
    written = (write_script(row, chat, infos, TURNS, Lengths()) for row in rows)
    return list(islice((script for script in written if script.size() <= max_tokens), count))


def chat_row(
    pair: Pair, played: Sequence[Script], chat: ChatTokenizer, rounds: int, kind: str | None, equality: Equality
) -> dict[str, Any]:
    """The chats' row: sums over all of them. All sides read midstream's answers and compute their own."""
    known: dict[tuple[str, ...], Label | None] = {}

    def label(options: Sequence[str]) -> Label | None:
        return known.setdefault(tuple(options), make_label(chat, options))

    sides = {name: RemoteSide(name, worker, label) for name, worker in pair.turn(0)}
    raw: dict[str, list[float]] = {name: [0.0] * rounds for name in SIDES}
    longest = 0
    for script in played:
        # It warms our side's kernels up; the peer's are warm from the works before.
        reference = asyncio.run(play(sides["midstream"], script))
        longest = max(longest, *reference.context_tokens)
        for number in range(rounds):
            for name, _ in pair.turn(number):
                time.sleep(REST_S)
                found = asyncio.run(play(sides[name], script, reference.answers))
                raw[name][number] += found.seconds
                if name == "peer" and number == 0:
                    _note(equality, reference, found, kind)
    ids = [script.id for script in played]
    return {**row(f"chat of {TURNS} turns", longest, raw), "conversations": ids}


def _note(equality: Equality, reference: Played, found: Played, kind: str | None) -> None:
    """A plain LoRA's answers are another computation's; what the base model says is not."""
    pair = [p if kind == "alora" else p.base() for p in (reference, found)]
    widths = [meaningful(done.answer.tokens, equality.ends) for done in pair[0].calls]
    cut = [_cut(p, widths) for p in pair]
    equality.compared += len(widths)
    equality.differing += [f"{difference} (chat)" for difference in differences(*cut)]


def _cut(played: Played, widths: Sequence[int]) -> Played:
    calls = [
        done._replace(answer=done.answer._replace(tokens=done.answer.tokens[:width]))
        for done, width in zip(played.calls, widths, strict=True)
    ]
    return dataclasses.replace(played, calls=calls)
