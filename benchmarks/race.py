"""A race of activated and plain LoRA: many RAG chats at once, on the embedded engine and on vLLM with the plugin.

So many MTRAG conversations (test split first, then train) are to be played, of which `--concurrency` are at any time
under way. A turn is that of `benchmarks.turn`: the question is rewritten (query_rewrite) beside the guard (jailbreak);
its passages are given; answerability; the base model's answer; then hallucination, certainty and requirement_check at
once. Base answers and rewritten questions have fixed lengths, a label is one decision; so all sides read prompts of the
same lengths and decode as many tokens. A conversation goes on with what the side's own base model answered, for that is
what it has KV of.

The sides: `embedded-alora`, `embedded-lora`, `vllm-alora`, `vllm-lora`. The plain LoRAs are the aLoRAs' own weights, on
the same prompts, and keep the KV of their own prefixes as far as the budget holds it, which is the same for all sides.

vLLM is its OpenAI server, started as `midstream serve --backend vllm` starts it: requests come when their conversations
are ready, and vLLM batches them as they come. Its offline `LLM.generate` would make each batch wait for its slowest
request before the next one begins. What HTTP costs is in vLLM's seconds, on both of its sides alike; the embedded
engine is called in this process.

How it is interleaved: engines one after the other, of which only one is loaded at a time, since no figure is of both.
Of one engine, the conversations are raced in blocks of `--block`; each block is played by one side and then the other,
no KV at its start, and the first is another one from block to block. A side's wall time is the sum over the blocks, so
that at each block's end fewer than `--concurrency` are under way. `--block` as many as there are makes it one race a
side.

    python -m benchmarks.race --data DATA/rag --json benchmarks/results/race.json
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.common import machine, spread, write
from benchmarks.load import percentiles
from benchmarks.peers import default_dtype
from benchmarks.peers_build import VLLM, Builder
from benchmarks.peers_process import WorkerError
from benchmarks.peers_protocol import Absent
from benchmarks.race_sides import KINDS, Field, Sides, embedded, served
from benchmarks.turn_play import Done, Played, play
from benchmarks.turn_script import INTRINSICS, Call, Lengths, Script, read_rows, write_script
from benchmarks.turn_sides import Answer, Side, plain_copies
from midstream.errors import MidstreamError
from midstream.library import library_folder
from midstream.models.chat import ChatTokenizer
from midstream.models.source import DEFAULT_MODEL, resolve
from midstream.remote.folders import read_folder

Open = Callable[[Field, asyncio.Runner], AbstractContextManager[Sides]]
ENGINES: Mapping[str, Open] = {"embedded": embedded, "vllm": served}
SIDES = tuple(f"{engine}-{kind}" for engine in ENGINES for kind in KINDS)
_CONTEXT = 8192  # the default model's, in tokens
_ROOM = 64  # of it, for what a label begins with
_WARMING = 2  # conversations whose first turn every side plays before it is timed


@dataclass(frozen=True, slots=True)
class Ran:
    """A block that a side has played: wall seconds of the whole, and what it did in each conversation."""

    seconds: float
    played: Sequence[Played]


Rounds = list[list[Ran]]
"""Of one side: in each round, its blocks."""
Keep = Callable[[Mapping[str, Rounds], Mapping[str, str]], None]


def main() -> None:
    options = parser().parse_args()
    model, root = resolve(DEFAULT_MODEL, progress=True), library_folder(DEFAULT_MODEL)
    if root is None:
        raise SystemExit("run from a checkout: the benchmark needs library/")
    before = machine()
    own = {name: root / name for name in INTRINSICS}
    chat = ChatTokenizer.from_folder(model)
    with tempfile.TemporaryDirectory() as scratch:
        field = Field(
            model=model,
            chat=chat,
            folders={"alora": own, "lora": plain_copies(own, Path(scratch))},
            scripts=choose(chat, own, options),
            dtype=options.dtype,
            kv_mib=options.kv_mib,
            builder=Builder(install=not options.no_install),
            scratch=Path(scratch),
        )

        def keep(rounds: Mapping[str, Rounds], absent: Mapping[str, str]) -> None:
            after = {**before, "load_average_after": round(os.getloadavg()[0], 2)}
            write(options.json, {**report(rounds, absent), **settings(field, options), "machine": after})

        compete(field, options, keep)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--data", type=Path, required=True, help="folder of the mtrag_*.jsonl files")
    found.add_argument("--conversations", type=int, default=32, help="the first N that are long enough and fit")
    found.add_argument("--turns", type=int, default=5, help="of each conversation")
    found.add_argument("--concurrency", type=int, default=8, help="conversations under way at a time")
    found.add_argument("--answer-tokens", type=int, default=128, help="of each base answer")
    found.add_argument("--sides", type=_sides, default=SIDES, help=f"default: {','.join(SIDES)}")
    found.add_argument("--rounds", type=int, default=1, help="races of each side")
    found.add_argument("--block", type=int, default=16, help="conversations that a side plays before the other one")
    found.add_argument("--dtype", default=default_dtype(), choices=("float32", "bfloat16"))
    found.add_argument("--kv-mib", type=int, default=3072, help="memory for KV, the same for all sides")
    found.add_argument("--no-install", action="store_true", help="leave vLLM out where it is not installed")
    found.add_argument("--json", type=Path)
    return found


def _sides(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := set(names) - set(SIDES):
        raise ValueError(f"no side: {', '.join(sorted(unknown))}")
    return names


def choose(chat: ChatTokenizer, adapters: Mapping[str, Path], options: argparse.Namespace) -> list[Script]:
    """The scripts of the first conversations that are long enough and fit the context. Raises SystemExit."""
    infos = {name: read_folder(folder) for name, folder in adapters.items()}
    lengths = Lengths(answer=options.answer_tokens)
    rows = (row for row in read_rows(options.data, ("test", "train")) if len(row["turns"]) >= options.turns)
    written = (write_script(row, chat, infos, options.turns, lengths) for row in rows)
    found = list(islice((s for s in written if s.size() <= _CONTEXT - _ROOM), options.conversations))
    if len(found) < options.conversations:
        raise SystemExit(f"only {len(found)} conversations have {options.turns} turns and fit: ask for fewer")
    return found


# ---------------------------------------------------------------------- the race


def compete(field: Field, options: argparse.Namespace, keep: Keep, engines: Mapping[str, Open] = ENGINES) -> None:
    """Race all sides that are asked for. After each engine `keep` gets all that is found till then: the rounds of every
    side that reached the end, and why others did not, by the side's name."""
    finished: dict[str, Rounds] = {}
    absent: dict[str, str] = {}
    blocks = split(field.scripts, options.block)
    for name, start in engines.items():
        wanted = [side for side in options.sides if side.startswith(f"{name}-")]
        if not wanted:
            continue
        try:
            with asyncio.Runner() as runner, start(field, runner) as sides:
                chosen = [side for side in sides.values() if side.name in wanted]
                found, failed = rounds_of(runner, chosen, blocks, options.concurrency, options.rounds)
        except (Absent, MidstreamError) as error:
            found, failed = {}, dict.fromkeys(wanted, str(error))
        finished |= found
        absent |= failed
        keep(finished, absent)


def split(scripts: Sequence[Script], block: int) -> list[Sequence[Script]]:
    return [scripts[start : start + block] for start in range(0, len(scripts), block)]


def rounds_of(
    runner: asyncio.Runner, sides: Sequence[Side], blocks: Sequence[Sequence[Script]], concurrency: int, rounds: int
) -> tuple[dict[str, Rounds], dict[str, str]]:
    """All rounds of an engine's sides. One that fails is left out from then on, and its reason is told."""
    found: dict[str, Rounds] = {side.name: [[] for _ in range(rounds)] for side in sides}
    failed: dict[str, str] = {}
    first = [dataclasses.replace(script, turns=script.turns[:1]) for script in blocks[0][:_WARMING]]
    turn = 0
    for number, block in [(None, first), *((number, block) for number in range(rounds) for block in blocks)]:
        for side in [*sides[turn:], *sides[:turn]]:
            if side.name in failed:
                continue
            try:
                ran = runner.run(race(side, block, concurrency))
            except (WorkerError, MidstreamError) as error:
                failed[side.name] = str(error)
                print(f"{side.name} failed: {error}", flush=True)
                continue
            if number is not None:
                found[side.name][number].append(ran)
                print(f"round {number}, {side.name}: {len(block)} conversations in {ran.seconds:.1f} s", flush=True)
        turn = (turn + 1) % max(1, len(sides))
    return {name: each for name, each in found.items() if name not in failed}, failed


async def race(side: Side, scripts: Sequence[Script], concurrency: int) -> Ran:
    """Play conversations with no KV at the start, so many at a time. Raises WorkerError."""
    await side.fresh()
    shared = Shared(side)
    places = asyncio.Semaphore(concurrency)

    async def one(script: Script) -> Played:
        async with places:
            return await play(shared, script)

    started = time.perf_counter()
    tasks = [asyncio.create_task(one(script)) for script in scripts]
    try:
        played = await asyncio.gather(*tasks)
        return Ran(time.perf_counter() - started, played)
    finally:
        # Where one failed, the others would go on beside the next side.
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Shared:
    """A side that plays several conversations at once: the beginning of one does not make it forget the others."""

    def __init__(self, side: Side) -> None:
        self.name = side.name
        self._side = side

    async def fresh(self) -> None:
        pass

    async def run(self, call: Call) -> Answer:
        answer = await self._side.run(call)
        if not call.options and len(answer.tokens) != call.tokens:
            raise WorkerError(f"{self.name} gave {len(answer.tokens)} tokens where {call.tokens} were asked for")
        return answer

    async def kv_bytes(self) -> int:
        return 0  # several conversations' at any moment, so no conversation's


# ---------------------------------------------------------------------- the report


def report(rounds: Mapping[str, Rounds], absent: Mapping[str, str]) -> dict[str, Any]:
    """What is told of the sides, LoRA's time over aLoRA's on each engine, and who did not take part and why."""
    pairs = {engine: [rounds.get(f"{engine}-{kind}") for kind in KINDS] for engine in ENGINES}
    return {
        "ratio": {engine: _ratio(*pair) for engine, pair in pairs.items()},
        "sides": {name: tally(each) for name, each in rounds.items()},
        "absent": [{"side": name, "reason": reason} for name, reason in absent.items()],
    }


def _ratio(alora: Rounds | None, lora: Rounds | None) -> dict[str, Any] | None:
    """Of whole rounds, and of each block; None where a side is missing."""
    if alora is None or lora is None:
        return None
    each = [b / a for a, b in zip(_seconds(alora), _seconds(lora), strict=True)]
    blocks = [
        [theirs.seconds / ours.seconds for ours, theirs in zip(*pair, strict=True)]
        for pair in zip(alora, lora, strict=True)
    ]
    return {**spread(each), "blocks": blocks}


def _seconds(rounds: Rounds) -> list[float]:
    return [sum(ran.seconds for ran in blocks) for blocks in rounds]


def tally(rounds: Rounds) -> dict[str, Any]:
    """One side's figures. `hit_rate`: cached prompt tokens over prompt tokens, as the calls' usage tells them."""
    calls = [done for blocks in rounds for ran in blocks for played in ran.played for done in played.calls]
    base = [done for done in calls if done.call.adapter is None]
    adapters = [done for done in calls if done.call.adapter is not None]
    seconds = _seconds(rounds)
    return {
        "s": statistics.median(seconds),
        "spread": spread(seconds),
        "raw_s": [[ran.seconds for ran in blocks] for blocks in rounds],
        "hit_rate": {"base": _hit_rate(base), "adapters": _hit_rate(adapters), "all": _hit_rate(calls)},
        "prompt_tokens": {"base": _prompts(base), "adapters": _prompts(adapters)},
        "computed_tokens": {"base": _computed(base), "adapters": _computed(adapters)},
        "calls": len(calls),
        "waits_s": _waits(calls),
    }


def _hit_rate(calls: Sequence[Done]) -> float:
    return 1 - _computed(calls) / _prompts(calls)


def _prompts(calls: Sequence[Done]) -> int:
    return sum(len(done.call.prompt) for done in calls)


def _computed(calls: Sequence[Done]) -> int:
    return sum(done.answer.computed for done in calls)


def _waits(calls: Sequence[Done]) -> dict[str, dict[str, float]]:
    """Seconds that a conversation waited for one call of a kind."""
    waits: dict[str, list[float]] = {}
    for done in calls:
        waits.setdefault(done.call.adapter or "answer", []).append(done.seconds)
    return {name: percentiles(values) for name, values in waits.items()}


def settings(field: Field, options: argparse.Namespace) -> dict[str, Any]:
    """What was raced, and on what terms."""
    names = ("turns", "concurrency", "answer_tokens", "rounds", "block", "dtype", "kv_mib")
    return {
        **{name: getattr(options, name) for name in names},
        "rewrite_tokens": field.scripts[0].lengths.rewrite,
        "vllm": VLLM,
        "conversations": [{"id": script.id, "tokens": script.size()} for script in field.scripts],
    }


if __name__ == "__main__":
    main()
