"""Five turns of a RAG chat over real conversations: a base answer of 128 tokens and six intrinsics a turn, end to end.

Each turn: the question is rewritten (query_rewrite) beside the guard (jailbreak); its passages are given (those that
the data set calls relevant); answerability; the base model's answer; then hallucination, certainty and
requirement_check at once. The sides, interleaved, each conversation with no KV at its start:

- alora: midstream with the six aLoRAs;
- lora_cold: the same engine and the same weights as plain LoRAs that read the whole conversation at each call, and keep
  nothing; the base model keeps its KV;
- lora_warm: the same plain LoRAs, each of which keeps its own KV as far as the budget holds it;
- peft: PEFT and transformers with the six aLoRAs, the base model's KV kept over the turns.

All sides read the same tokens and decode as many: base answers and rewritten questions have fixed lengths, a label is
one decision. Prompts are the same tokens too: where a plain LoRA is called, aLoRA's invocation stands as plain text.
Before anything is timed, every answer of the aLoRA side is compared with the same call computed from nothing; in every
round, base answers are compared between the sides. In float32 a difference ends the run. Narrower types round
otherwise where other rows are computed at once, so that near ties fall otherwise: there differences are counted.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import machine, spread, write
from benchmarks.turn_play import PHASES, Comparison, Played, play, recomputed
from benchmarks.turn_script import INTRINSICS, REQUIREMENT, Lengths, Script, read_rows, write_script
from benchmarks.turn_sides import EngineSide, PeftSide, Side, plain_copies
from midstream.config import EngineConfig
from midstream.engine.apart import apart
from midstream.library import library_folder
from midstream.models.source import DEFAULT_MODEL, resolve
from midstream.session import Engine

# Rounds of one side: in each, what it played of every conversation.
Rounds = Mapping[str, Sequence[Sequence[Played]]]


def main() -> None:
    arguments = _parser().parse_args()
    root = library_folder(DEFAULT_MODEL)
    if root is None:
        raise SystemExit("run from a checkout: the benchmark needs library/")
    config = EngineConfig(kv_budget_bytes=arguments.kv_mib * 1024**2)
    with (
        tempfile.TemporaryDirectory() as folder,
        Engine.load(config=config, dtype=arguments.dtype, wait_for_kernels=True) as engine,
    ):
        folders = {name: root / name for name in INTRINSICS}
        sides = engine_sides(engine, folders, Path(folder))
        if arguments.peft_rounds:
            aio = engine.aio
            model = resolve(DEFAULT_MODEL)
            sides.append(apart(lambda: PeftSide(model, folders, aio.chat.encode, aio._loaded.dtype)))
        scripts = choose(engine, read_rows(arguments.data), arguments)
        report = measure(engine, sides, scripts, arguments.rounds, arguments.peft_rounds, check=not arguments.unchecked)
        report["kv_budget_bytes"] = engine.stats().kv_total_bytes
        report["dtype"] = str(engine.aio._loaded.dtype).removeprefix("torch.")
    write(arguments.json, {**report, "machine": machine()})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the mtrag_*.jsonl files")
    parser.add_argument("--conversations", type=int, default=2, help="the first N test conversations that fit")
    parser.add_argument("--skip", type=int, default=0, help="leave out that many of them first")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peft-rounds", type=int, default=1)
    parser.add_argument(
        "--unchecked", action="store_true", help="do not compare with recomputing from nothing; it was done before"
    )
    parser.add_argument(
        "--kv-mib", type=int, default=3072, help="memory for KV, the same for all of the engine's sides"
    )
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--json", type=Path)
    return parser


def engine_sides(engine: Engine, folders: Mapping[str, Path], scratch: Path) -> list[Side]:
    """Load the six aLoRAs by the intrinsic's name, and the same weights as plain LoRAs. `scratch` holds the copies."""
    own = {name: engine.load_adapter(folder, name=name).name for name, folder in folders.items()}
    plain = {name: engine.load_adapter(copy).name for name, copy in plain_copies(folders, scratch).items()}
    return [
        EngineSide("alora", engine, own, "all"),
        EngineSide("lora_cold", engine, plain, "base"),
        EngineSide("lora_warm", engine, plain, "all"),
    ]


def choose(engine: Engine, rows: Any, arguments: argparse.Namespace) -> list[Script]:
    """The scripts of the first conversations that are long enough and fit the context."""
    adapters = {info.name: info for info in engine.adapters()}
    lengths = Lengths()
    long_enough = (row for row in rows if len(row["turns"]) >= arguments.turns)
    scripts = (write_script(row, engine.aio.chat, adapters, arguments.turns, lengths) for row in long_enough)
    fitting = (script for script in scripts if script.size() <= engine.aio.max_context_tokens)
    return list(islice(fitting, arguments.skip, arguments.skip + arguments.conversations))


def measure(
    engine: Engine,
    sides: Sequence[Side],
    scripts: Sequence[Script],
    rounds: int,
    peft_rounds: int,
    *,
    check: bool = True,
) -> dict[str, Any]:
    """Check, then play all rounds. Raises SystemExit where an engine's side does not answer as it must."""
    comparison = Comparison(strict=engine.aio._loaded.dtype == torch.float32)
    references = [_reference(sides[0], script) for script in scripts]
    if check:
        alone = EngineSide("alone", engine, {name: name for name in INTRINSICS}, "nothing")
        for reference in references:
            found = asyncio.run(recomputed(alone, reference))
            comparison.note("alora, computed from nothing", reference, found)
    played: dict[str, list[list[Played]]] = {side.name: [] for side in sides}
    for number in range(rounds):
        taking_part = [side for side in sides if side.name != "peft" or number < peft_rounds]
        for side in taking_part:
            played[side.name].append([])
        # Each side comes first, second, ... in turn, so that none always follows the same one.
        turned = [taking_part[(number + i) % len(taking_part)] for i in range(len(taking_part))]
        for script, reference in zip(scripts, references, strict=True):
            for side in turned:
                played[side.name][-1].append(_one(side, script, reference, comparison))
    return {**report(scripts, references, played), "equal": comparison.counts}


def _reference(alora: Side, script: Script) -> Played:
    """What the aLoRA side answers. It warms all kernels up too."""
    reference = asyncio.run(play(alora, script))
    print(f"{script.id}: context after each turn {reference.context_tokens}", flush=True)
    return reference


def _one(side: Side, script: Script, reference: Played, comparison: Comparison) -> Played:
    played = asyncio.run(play(side, script, reference.answers))
    print(f"{script.id} {side.name}: {played.seconds:.1f} s", flush=True)
    # A plain LoRA's labels are another computation's; what the base model says is not.
    same_adapters = side.name in ("alora", "peft")
    comparison.note(side.name, *(p if same_adapters else p.base() for p in (reference, played)))
    return played


# ---------------------------------------------------------------------- the report


def report(scripts: Sequence[Script], references: Sequence[Played], played: Rounds) -> dict[str, Any]:
    """Medians over the rounds of each side's sums over all conversations, with all raw seconds."""
    sums = {name: [sum(p.seconds for p in row) for row in rows] for name, rows in played.items()}
    middle = {name: statistics.median(values) for name, values in sums.items()}
    peft = middle.get("peft")
    return {
        "lora_cold_s": middle["lora_cold"],
        "lora_warm_s": middle["lora_warm"],
        "alora_s": middle["alora"],
        "ratio": middle["lora_cold"] / middle["alora"],
        "ratio_warm": middle["lora_warm"] / middle["alora"],
        "peft_s": peft,
        "ratio_peft": None if peft is None else peft / middle["alora"],
        "requirement": REQUIREMENT,
        "answer_tokens": scripts[0].lengths.answer,
        "rewrite_tokens": scripts[0].lengths.rewrite,
        "conversations": [
            {"id": script.id, "context_tokens": reference.context_tokens}
            for script, reference in zip(scripts, references, strict=True)
        ],
        "phases_s": _by_side(played, _phases),
        "waits_s": _by_side(played, _waits),
        "computed_tokens": _by_side(played, lambda rows: sum(p.computed_tokens for p in rows[-1])),
        "kv": _by_side(played, _memory),
        "per_conversation_s": _by_side(played, _per_conversation),
        "per_conversation_ratio": _ratios(_by_side(played, _per_conversation)),
        "spread": {name: spread(values) for name, values in sums.items()},
        "raw_s": sums,
    }


def _by_side(played: Rounds, make: Callable[[Sequence[Sequence[Played]]], Any]) -> dict[str, Any]:
    return {name: make(rows) for name, rows in played.items()}


def _phases(rows: Sequence[Sequence[Played]]) -> dict[str, float]:
    """Median over the rounds of each phase's sum over all turns."""
    return {name: statistics.median(sum(sum(p.phases[name]) for p in row) for row in rows) for name in PHASES}


def _waits(rows: Sequence[Sequence[Played]]) -> dict[str, float]:
    """Median seconds that one call of a kind took, other calls beside it."""
    waits: dict[str, list[float]] = {}
    for done in (done for row in rows for p in row for done in p.calls):
        waits.setdefault(done.call.adapter or "answer", []).append(done.seconds)
    return {name: statistics.median(values) for name, values in waits.items()}


def _memory(rows: Sequence[Sequence[Played]]) -> dict[str, int]:
    """KV bytes kept after a turn: at the conversations' ends (the largest), and the most after any turn."""
    return {
        "end_bytes": max(p.kv_bytes[-1] for row in rows for p in row),
        "peak_bytes": max(max(p.kv_bytes) for row in rows for p in row),
    }


def _per_conversation(rows: Sequence[Sequence[Played]]) -> list[float]:
    return [statistics.median(p.seconds for p in column) for column in zip(*rows, strict=True)]


def _ratios(seconds: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """Each conversation's seconds on every other side, over those of aLoRA's."""
    others = {name: each for name, each in seconds.items() if name != "alora"}
    return {name: [a / b for a, b in zip(each, seconds["alora"], strict=True)] for name, each in others.items()}


if __name__ == "__main__":
    main()
