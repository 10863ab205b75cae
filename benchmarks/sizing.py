"""How many GPUs a load takes, by the model of bytes and operations in `benchmarks.scaling`. Nothing was measured.

A load is a number of open conversations, each of which has a turn every so many seconds: a prompt of new tokens, an
answer, and calls of adapters that answer with a label. A replica is busy for as long as its turns' work takes where
weights are read for a whole batch at once: for each forward the longer of computing it and reading the KV that it sees,
and for each token of an answer its share of a step of `batch` answers. Replicas are enough when that is no more than
`utilisation` of the time.

Memory decides how many conversations a replica keeps, and so the hit rate: the share of turns whose conversation is
still there. A router that knows no conversations sends a turn to the replica of the one before by chance alone.

    python -m benchmarks.sizing --conversations 2000 --context 16384
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, fields, replace
from typing import Literal

from benchmarks.scaling import GPUS, LARGE, Machine, Shape

Calls = Literal["alora", "lora kept", "lora read again"]
_GPU_BYTES = 80e9
# Of a GPU's memory: what vLLM takes by default, the rest is its own working memory.
_USABLE = 0.9
_MOST_REPLICAS = 100_000


@dataclass(frozen=True, slots=True)
class Load:
    """What users do, and what is asked of adapters. Lengths are in tokens; `context` is a conversation's with its
    newest turn."""

    conversations: int = 1000
    every_s: float = 30.0
    context: int = 8192
    new: int = 500
    answer: int = 200
    calls: int = 6
    invocation: int = 8
    rank: int = 32
    batch: int = 16
    utilisation: float = 0.7


@dataclass(frozen=True, slots=True)
class Plan:
    """What a load takes: replicas, and what each of them does."""

    replicas: int
    kept: float
    hit_rate: float
    turn_s: float


def adapter_bytes(shape: Shape, rank: int) -> int:
    """Bytes of one adapter's matrices on all seven linear layers."""
    queries, keys = shape.heads * shape.dim, shape.kv_heads * shape.dim
    attention = 2 * (shape.hidden + queries) + 2 * (shape.hidden + keys)
    return shape.layers * rank * (attention + 3 * (shape.hidden + shape.intermediate)) * shape.bytes


def conversation_bytes(shape: Shape, load: Load, calls: Calls) -> int:
    """KV of one conversation. Plain LoRAs that keep theirs have one each beside the base model's."""
    copies = 1 + load.calls if calls == "lora kept" else 1
    return copies * load.context * shape.kv_bytes_per_token


def kept(shape: Shape, gpus: int, load: Load, calls: Calls) -> float:
    """How many conversations' KV a replica of so many GPUs has room for; 0 where the model does not fit."""
    weights = shape.read_bytes(0) + shape.head_weights * shape.bytes  # the embedding beside the head
    room = gpus * _GPU_BYTES * _USABLE - weights - load.calls * adapter_bytes(shape, load.rank)
    return max(0.0, room / conversation_bytes(shape, load, calls))


def turn_s(shape: Shape, machine: Machine, load: Load, calls: Calls, hit_rate: float) -> float:
    """Seconds that one turn keeps a replica busy, where `hit_rate` of the turns find their conversation."""
    known = load.context - load.new - load.answer

    def work(start: int, end: int) -> float:
        return max(
            shape.operations(start, end) / machine.operations_per_s,
            end * shape.kv_bytes_per_token / machine.bytes_per_s,
        )

    def found(start: int, end: int) -> float:
        return hit_rate * work(start, end) + (1 - hit_rate) * work(0, end)

    prompt = found(known, known + load.new)
    reading = shape.read_bytes(load.batch * load.context) / machine.bytes_per_s
    computing = load.batch * shape.operations(load.context, load.context + 1) / machine.operations_per_s
    answer = load.answer * max(reading, computing) / load.batch
    end = load.context + load.invocation
    by_calls = {
        # The base model has read all before the invocation, in this very turn.
        "alora": work(load.context, end),
        "lora kept": found(known, end),
        "lora read again": work(0, end),
    }
    return prompt + answer + load.calls * by_calls[calls]


def plan(shape: Shape, machine: Machine, gpus: int, load: Load, calls: Calls, *, affinity: bool = True) -> Plan | None:
    """The fewest replicas that are enough; None where the model does not fit, or no number is."""
    room = kept(shape, gpus, load, calls)
    if room < 1:
        return None
    for replicas in range(1, _MOST_REPLICAS):
        hit_rate = min(1.0, replicas * room / load.conversations) / (1 if affinity else replicas)
        seconds = turn_s(shape, machine, load, calls, hit_rate)
        if load.conversations / load.every_s * seconds <= replicas * load.utilisation:
            return Plan(replicas, room, hit_rate, seconds)
    return None


_KINDS: tuple[tuple[str, Calls, bool], ...] = (
    ("aLoRAs, a router by conversation", "alora", True),
    ("aLoRAs, any replica", "alora", False),
    ("plain LoRAs that keep their KV, a router by conversation", "lora kept", True),
    ("plain LoRAs that read all again", "lora read again", True),
)


def memory_table(load: Load) -> str:
    """What a conversation and an adapter take, as Markdown."""
    columns = "weights | KV of a token | KV of a conversation | of one with LoRAs that keep theirs | an adapter"
    rows = [f"| predicted | {columns} |", "|---|---|---|---|---|---|"]
    for shape in LARGE:
        one, many = conversation_bytes(shape, load, "alora") / 1e9, conversation_bytes(shape, load, "lora kept") / 1e9
        rows.append(
            f"| {shape.name} | {shape.read_bytes(0) / 1e9:.0f} GB | {shape.kv_bytes_per_token / 1e3:.0f} kB "
            f"| {one:.1f} GB | {many:.1f} GB | {adapter_bytes(shape, load.rank) / 1e6:.0f} MB |"
        )
    return "\n".join(rows) + "\n"


def gpu_table(load: Load) -> str:
    """How many GPUs the load takes in each way, as Markdown."""
    rows = ["| predicted, not measured | kept by a replica | hit rate | busy for a turn | replicas | GPUs |"]
    rows.append("|---|---|---|---|---|---|")
    for shape, (machine, gpus) in zip(LARGE, zip(GPUS, (1, 8), strict=True), strict=True):
        for name, calls, affinity in _KINDS:
            found = plan(shape, machine, gpus, load, calls, affinity=affinity)
            head = f"| {shape.name}, {machine.name} a replica: {name} |"
            rows.append(f"{head} {_row(found, gpus)} |" if found is not None else f"{head} | | | none is enough | |")
    return "\n".join(rows) + "\n"


def _row(found: Plan, gpus: int) -> str:
    return (
        f"{found.kept:,.1f} | {found.hit_rate:.0%} | {1e3 * found.turn_s:,.0f} ms | {found.replicas:,} "
        f"| {found.replicas * gpus:,}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(Load):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    load = replace(Load(), **vars(parser.parse_args()))
    if load.context < load.new + load.answer:
        parser.error("a conversation's context has its newest turn in it: --context is too small")
    print(memory_table(load))
    print(gpu_table(load))
    fewest = math.ceil(load.conversations / kept(LARGE[0], 1, load, "alora"))
    print(f"To keep all {load.conversations:,} conversations of the first model takes {fewest:,} replicas.")


if __name__ == "__main__":
    main()
