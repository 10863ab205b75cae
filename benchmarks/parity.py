"""Does an aLoRA lose accuracy against a plain LoRA? Both trained alike on the same fixed subset of four tasks.

For each task: LoRA at ranks 8 and 32, aLoRA at ranks 8, 32 and 64, on attention only and on all linear layers, the
learning rate of each arm tuned by the validation loss at the first seed, three seeds. Fixed before the first run: an
aLoRA is *not worse* on a task when the 95 % interval of its accuracy less the LoRA's (paired bootstrap over the test
rows, mean of the seeds) is at least minus 1.5 points, and *within the margin* when the difference itself is. Each kind
is represented by its arm with the lowest mean validation loss.

Runs are kept one a line in --runs, so a study that was stopped goes on. --summary writes what the runs so far say.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import interval, machine
from midstream.models.chat import ChatTokenizer
from midstream.models.source import DEFAULT_MODEL
from midstream.training.base_kv import BaseKV
from midstream.training.data import Example, sample
from midstream.training.losses import target_logits
from midstream.training.run import DataConfig, load_examples, load_network
from midstream.training.tasks import TASKS, Task
from midstream.training.trainer import ALL_LINEAR, ATTENTION, TrainConfig, train

MARGIN = 0.015
RATES = (5e-4, 1.5e-3)
SEEDS = (0, 1, 2)
_KEY = ("task", "kind", "rank", "targets", "rate", "seed")
TARGETS = {"all-linear": ALL_LINEAR, "attention": ATTENTION}
RANKS = {"alora": (8, 32, 64), "lora": (8, 32)}
# Training files, test files, and the longest prefix: short rows, so that a plain LoRA can be trained here at all.
DATA = {
    "jailbreak": (("jailbreak/mixed.train",), ("jailbreak/mixed.test",), 112),
    "hallucination": (
        ("groundedness/begin.train", "groundedness/begin_extra.train"),
        ("groundedness/begin.test",),
        112,
    ),
    "requirement_check": (("requirement/ifeval.train",), ("requirement/ifeval.test",), 192),
    "answerability": (("answerability/squad2.train",), ("answerability/squad2.test",), 176),
}


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to train, apart from the learning rate and the seed."""

    kind: str
    rank: int
    targets: str

    def __str__(self) -> str:
        return f"{self.kind} {self.rank} {self.targets}"


ARMS = tuple(Arm(kind, rank, targets) for targets in TARGETS for kind in ("lora", "alora") for rank in RANKS[kind])


@dataclass(frozen=True, slots=True)
class Subset:
    """A task's fixed rows."""

    task: Task
    training: Sequence[Example]
    test: Sequence[Example]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the data sets")
    parser.add_argument("--tasks", default=",".join(DATA))
    parser.add_argument("--rows", type=int, default=160, help="to train on, a fifth of them for validation")
    parser.add_argument("--test-rows", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the base model")
    parser.add_argument("--arms", type=_arms, default=ARMS, help="such as 'lora 32 all-linear,alora 32 all-linear'")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no further run after so long")
    parser.add_argument("--runs", type=Path, default=Path("benchmarks/results/parity_runs.jsonl"))
    parser.add_argument("--summary", type=Path, help="write the summary here instead of training")
    arguments = parser.parse_args()
    if arguments.summary:
        summary = summarise(_read(arguments), arguments.arms)
        arguments.summary.write_text(json.dumps({"machine": machine(), **summary}, indent=2) + "\n")
        print(table(summary))
        return
    deadline = time.monotonic() + 60 * arguments.minutes
    network, chat = load_network(DEFAULT_MODEL, dtype=arguments.dtype)
    for name in arguments.tasks.split(","):
        subset = load(name, arguments, chat)
        base_kv = BaseKV(network, memory_bytes=6 * 2**30)
        study(network, chat, subset, base_kv, arguments, deadline)


def load(name: str, arguments: argparse.Namespace, chat: ChatTokenizer) -> Subset:
    training, test, longest = DATA[name]

    def rows(files: Sequence[str], count: int) -> Sequence[Example]:
        paths = tuple(arguments.data / f"{file}.jsonl" for file in files)
        found = load_examples(DataConfig(paths, name, invocation_text=f"<|im_start|>{name}\n"), chat)
        return sample(found.examples, count, longest, 0)

    return Subset(TASKS[name], rows(training, arguments.rows), rows(test, arguments.test_rows))


def study(
    network: Any,
    chat: ChatTokenizer,
    subset: Subset,
    base_kv: BaseKV,
    arguments: argparse.Namespace,
    deadline: float,
) -> None:
    """All runs of one task that are not there yet."""
    for arm, rate, seed in plan(lambda: _read(arguments), subset.task.name, arguments.arms):
        if time.monotonic() > deadline:
            return
        config = TrainConfig(
            kind=arm.kind,  # type: ignore[arg-type]
            rank=arm.rank,
            alpha=2 * arm.rank,
            targets=TARGETS[arm.targets],
            learning_rate=rate,
            epochs=arguments.epochs,
            batch_size=8,
            validation=0.2,
            seed=seed,
        )
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            result = train(network, subset.training, config, base_kv=base_kv, run_folder=Path(folder))
        trained = time.perf_counter() - started
        kv = base_kv if arm.kind == "alora" else None
        chances = first_label(result.network.get_base_model(), chat, subset, kv)
        run = {
            "task": subset.task.name,
            **asdict(arm),
            "rate": rate,
            "seed": seed,
            "size": _size(arguments),
            "train_rows": len(subset.training),
            "validation_loss": min(entry["validation_loss"] for entry in result.history),
            "train_s": round(trained, 1),
            "truth": [int(e.label == subset.task.answer(subset.task.labels[0])) for e in subset.test],
            "chances": [round(float(chance), 4) for chance in chances],
        }
        result.network.unload()
        with arguments.runs.open("a") as file:
            file.write(json.dumps(run) + "\n")
        print(subset.task.name, arm, rate, seed, f"{run['validation_loss']:.4f}", accuracy(run), flush=True)


def plan(read: Any, task: str, arms: Sequence[Arm] = ARMS) -> Iterator[tuple[Arm, float, int]]:
    """What to run next, decided anew each time: an arm's rates at the first seed, then the better at the others."""
    for arm in arms:
        for rate in RATES:
            if not _of(read(), task, arm, rate, SEEDS[0]):
                yield arm, rate, SEEDS[0]
        best = min(RATES, key=lambda rate: _of(read(), task, arm, rate, SEEDS[0])[0]["validation_loss"])
        for seed in SEEDS[1:]:
            if not _of(read(), task, arm, best, seed):
                yield arm, best, seed


@torch.no_grad()
def first_label(network: Any, chat: ChatTokenizer, subset: Subset, base_kv: BaseKV | None) -> np.ndarray:
    """P(first label) of each test row between the two labels, read where their tokens part."""
    one, other = (chat.encode(subset.task.answer(label)) for label in subset.task.labels)
    parting = next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    found = np.zeros(len(subset.test))
    order = sorted(range(len(subset.test)), key=lambda i: len(subset.test[i].prefix))
    for start in range(0, len(order), 8):
        index = order[start : start + 8]
        tails = [one[: parting + 1]] * len(index)
        logits = target_logits(network, [subset.test[i] for i in index], base_kv, tails)
        deciding = logits.view(len(index), parting + 1, -1)[:, -1, [one[parting], other[parting]]]
        found[index] = torch.softmax(deciding.float(), dim=-1)[:, 0].cpu().numpy()
    return found


def summarise(runs: Sequence[dict[str, Any]], wanted: Sequence[Arm] = ARMS) -> dict[str, Any]:
    """Arms with their figures, and the verdict on each task whose runs are all there."""
    chosen = [run for run in runs if _arm(run) in wanted]
    tasks = {name: _of_task([run for run in chosen if run["task"] == name], len(wanted)) for name in DATA}
    found = {name: task for name, task in tasks.items() if task}
    return {"margin": MARGIN, "rates": RATES, "runs": len(runs), "tasks": found}


def _of_task(runs: Sequence[dict[str, Any]], wanted: int) -> dict[str, Any]:
    arms: dict[str, Any] = {}
    for arm in {_arm(run) for run in runs}:
        tuned = _tuned(runs, arm)
        if len(tuned) == len(SEEDS):
            arms[str(arm)] = {
                "rate": tuned[0]["rate"],
                "validation_loss": float(np.mean([run["validation_loss"] for run in tuned])),
                "accuracy": float(np.mean([accuracy(run) for run in tuned])),
                "accuracy_by_seed": [accuracy(run) for run in tuned],
                "train_s": float(np.median([run["train_s"] for run in tuned])),
            }
    found = {"train_rows": runs[0]["train_rows"], "test_rows": len(runs[0]["truth"])} if runs else {}
    found["arms"] = dict(sorted(arms.items()))
    if len(arms) < wanted or {arm.partition(" ")[0] for arm in arms} != set(RANKS):
        return found if arms else {}
    best = {
        kind: min((arm for arm in arms if arm.startswith(f"{kind} ")), key=lambda arm: arms[arm]["validation_loss"])
        for kind in RANKS
    }
    sides = [_tuned(runs, _parse(best[kind])) for kind in ("alora", "lora")]
    return {**found, "best": best, "difference": compare(*sides)}


def compare(alora: Sequence[dict[str, Any]], lora: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Accuracy of one less the other: mean of the seeds, paired bootstrap over the rows."""
    correct = [np.mean([_correct(run) for run in side], axis=0) for side in (alora, lora)]
    each = correct[0] - correct[1]
    found = interval(each)
    # Sums of thirds of a row: rounded, so that a difference of exactly the margin is that.
    value = round(found["value"], 9)
    return {
        **found,
        "value": value,
        "within_margin": value >= -MARGIN,
        "not_worse": found["low"] >= -MARGIN,
    }


def table(summary: dict[str, Any]) -> str:
    lines = ["| task | best LoRA | best aLoRA | aLoRA less LoRA | within 1.5 points | not worse |", "|---" * 6 + "|"]
    for name, task in summary["tasks"].items():
        if "difference" not in task:
            continue
        best, d = task["best"], task["difference"]
        shown = [f"{best[kind]}: {task['arms'][best[kind]]['accuracy']:.3f}" for kind in ("lora", "alora")]
        interval = f"{d['value']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]"
        lines.append(f"| {name} | {' | '.join(shown)} | {interval} | {d['within_margin']} | {d['not_worse']} |")
    return "\n".join(lines)


def accuracy(run: dict[str, Any]) -> float:
    return float(_correct(run).mean())


def _correct(run: dict[str, Any]) -> np.ndarray:
    return ((np.array(run["chances"]) >= 0.5) == np.array(run["truth"], dtype=bool)).astype(float)


def _tuned(runs: Sequence[dict[str, Any]], arm: Arm) -> list[dict[str, Any]]:
    task = runs[0]["task"]
    first = [run for rate in RATES for run in _of(runs, task, arm, rate, SEEDS[0])]
    if len(first) < len(RATES):
        return []
    best = min(first, key=lambda run: run["validation_loss"])
    return [run for seed in SEEDS for run in _of(runs, task, arm, best["rate"], seed)]


def _of(runs: Sequence[dict[str, Any]], task: str, arm: Arm, rate: float, seed: int) -> list[dict[str, Any]]:
    wanted = {"task": task, **asdict(arm), "rate": rate, "seed": seed}
    return [run for run in runs if all(run[key] == value for key, value in wanted.items())]


def _arm(run: dict[str, Any]) -> Arm:
    return Arm(run["kind"], run["rank"], run["targets"])


def _arms(text: str) -> tuple[Arm, ...]:
    found = tuple(map(_parse, text.split(",")))
    if unknown := set(found).difference(ARMS):
        raise ValueError(f"no arms of the study: {', '.join(map(str, unknown))}")
    return found


def _parse(name: str) -> Arm:
    kind, rank, targets = name.split(" ")
    return replace(Arm(kind, 0, targets), rank=int(rank))


def _size(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in ("rows", "test_rows", "epochs", "dtype")}


def _read(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The runs on subsets of the size asked for, each once."""
    lines = arguments.runs.read_text().splitlines() if arguments.runs.is_file() else []
    runs = [run for run in map(json.loads, lines) if {"dtype": "float32", **run["size"]} == _size(arguments)]
    return list({json.dumps([run[key] for key in _KEY]): run for run in runs}.values())


if __name__ == "__main__":
    main()
