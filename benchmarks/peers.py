"""midstream beside its peers: transformers with PEFT, llama.cpp and vLLM, on the same prompts and adapters.

Each side runs in a process of its own, and only one of them computes at a time. Peers are taken one by one, each beside
a midstream of its own, in turns, round after round. Before anything is timed, both answer the same questions in
float32; where a token or a log-probability differs, nothing is timed. In the timed format, where near ties fall
otherwise, differences are counted. A peer that cannot be had is reported with the reason, and so is all that was left
out.

Peers: peft (an adapter reads the whole prompt at each call), peft:cache (its caller copies the base model's KV for it),
llama.cpp (or :BF16, :F16, :F32; :Q8_0 beside midstream with eight-bit weights), vllm (with plain LoRA), vllm:compiled
(the base model alone).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.common import write
from benchmarks.peers_build import Builder
from benchmarks.peers_chat import chat_row, scripts
from benchmarks.peers_launch import Launcher, Peer, Shape, read_info
from benchmarks.peers_measure import Equality, Pair, check, measure, peak_memory, start, started
from benchmarks.peers_process import ROOT, WorkerError, module
from benchmarks.peers_protocol import Absent
from benchmarks.peers_report import draw, joined, markdown
from benchmarks.peers_work import SHORTEST, WORKS, Item, checks, conversation, items, questions
from benchmarks.turn_script import INTRINSICS, Script
from midstream.library import library_folder
from midstream.models.chat import ChatTokenizer
from midstream.models.source import DEFAULT_MODEL, cache_folder, resolve

_CONTEXT = 8192  # the default model's, in tokens


@dataclass(slots=True)
class Report:
    """What is found, filled as the run goes on, so that a peer that fails keeps what it has."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    memory: list[dict[str, Any]] = field(default_factory=list)
    peers: dict[str, dict[str, Any]] = field(default_factory=dict)
    absent: list[dict[str, str]] = field(default_factory=list)
    left_out: list[dict[str, str]] = field(default_factory=list)

    def add(self, peer: Peer, row: dict[str, Any]) -> None:
        self.rows.append({"work": row["work"], "peer": str(peer), **row})
        print(f"{peer}: {row['work']}, {row['context']}: {row['ratio']:.2f}", flush=True)

    def leave_out(self, peer: Peer, work: str, reason: str) -> None:
        self.left_out.append({"peer": str(peer), "work": work, "reason": reason})
        print(f"{peer}: {work} left out: {reason}", flush=True)

    def miss(self, peer: Peer, reason: str) -> None:
        self.absent.append({"peer": str(peer), "reason": reason})
        print(f"{peer} is absent: {reason}", flush=True)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked of every peer. `dtype` is the timed one; `played` are the chats."""

    chat: ChatTokenizer
    launcher: Launcher
    items: Sequence[Item]
    played: Sequence[Script]
    checked: int
    works: Sequence[str]
    dtype: str
    rounds: int
    chat_rounds: int


def main() -> None:
    arguments = make_parser().parse_args()
    machine = measure_machine(arguments.threads)
    report = Report()
    with tempfile.TemporaryDirectory() as scratch:
        plan = make_plan(arguments, Path(scratch))
        for peer in arguments.peers:
            attempt(plan, peer, report)
    machine["load_average_after"] = round(os.getloadavg()[0], 2)
    for row in report.rows:
        row["read_gb_per_s"] = machine["read_gb_per_s"]
    settings = {name: getattr(arguments, name) for name in ("threads", "dtype", "rounds", "chat_rounds", "kv_mib")}
    whole = as_dict(report, machine, settings)
    if arguments.add_to:
        whole = joined(json.loads(arguments.add_to.read_text(encoding="utf-8")), whole)
    write(arguments.json, whole)
    text = markdown(whole)
    print(text)
    if arguments.markdown:
        arguments.markdown.write_text(text, encoding="utf-8")
    if arguments.png:
        draw(whole, arguments.png)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=_peers, default=_peers("peft,llama.cpp,vllm"))
    parser.add_argument("--work", type=_works, default=WORKS, help=",".join(WORKS))
    parser.add_argument("--contexts", type=_numbers, help="tokens, for all works; default: each work's own")
    parser.add_argument("--check-context", type=int, default=500, help="tokens before the answers that are compared")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--chat-rounds", type=int, help="default: as many")
    parser.add_argument("--data", type=Path, help="folder of the mtrag_*.jsonl files, for the chat")
    parser.add_argument("--conversations", type=int, default=1, help="the first N of them are played")
    parser.add_argument("--dtype", default=default_dtype(), choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each side")
    parser.add_argument("--kv-mib", type=int, default=1024, help="memory for KV at 16 bits; 32 bits get twice as much")
    parser.add_argument("--no-install", action="store_true", help="take no peer that must be built or installed first")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers at once, where one must be built")
    parser.add_argument("--add-to", type=Path, help="JSON of earlier runs: what is not measured again is kept")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--png", type=Path)
    return parser


def _peers(text: str) -> list[Peer]:
    return [Peer.parse(name) for name in text.split(",")]


def _works(text: str) -> list[str]:
    names = text.split(",")
    if unknown := set(names) - set(WORKS):
        raise ValueError(f"no work: {', '.join(sorted(unknown))}")
    return names


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def default_dtype() -> str:
    """What midstream takes by itself: 16 bits where the processor multiplies them natively."""
    cpuinfo = Path("/proc/cpuinfo")
    known = cpuinfo.read_text() if cpuinfo.is_file() else ""
    return "bfloat16" if "avx512_bf16" in known or "amx_bf16" in known else "float32"


def measure_machine(threads: int) -> dict[str, Any]:
    """The machine's limits, measured before any side runs and in a process that ends with it."""
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(module("peers_machine"), capture_output=True, text=True, check=True, cwd=ROOT, env=env)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def make_plan(arguments: argparse.Namespace, scratch: Path) -> Plan:
    model, root = resolve(DEFAULT_MODEL), library_folder(DEFAULT_MODEL)
    if root is None:
        raise SystemExit("run from a checkout: the benchmark needs library/")
    infos = {name: read_info(root / name) for name in INTRINSICS}
    chat = ChatTokenizer.from_folder(model)
    logs = cache_folder() / "peers" / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    builder = Builder(install=not arguments.no_install, jobs=arguments.jobs)
    asked = questions(chat, infos)
    wanted = "chat" in arguments.work and arguments.data is not None
    return Plan(
        chat=chat,
        launcher=Launcher(model, root, infos, arguments.threads, arguments.kv_mib, builder, scratch, logs),
        items=items(chat, asked, arguments.work, arguments.contexts),
        played=scripts(arguments.data, chat, infos, arguments.conversations, _CONTEXT) if wanted else (),
        checked=arguments.check_context,
        works=arguments.work,
        dtype=arguments.dtype,
        rounds=arguments.rounds,
        chat_rounds=arguments.chat_rounds or arguments.rounds,
    )


def as_dict(report: Report, machine: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What is written as JSON."""
    return {"machine": machine, "settings": settings, **asdict(report)}


def attempt(plan: Plan, peer: Peer, report: Report) -> None:
    """Compare with one peer. Whatever keeps it from being compared is in the report afterwards."""
    try:
        compare(plan, peer, report)
    except Absent as error:
        report.miss(peer, str(error))
    except WorkerError as error:
        report.leave_out(peer, "all that is not in the rows", str(error))


def compare(plan: Plan, peer: Peer, report: Report) -> None:
    """All of one peer. Raises Absent or WorkerError; what was found till then is in the report."""
    entry = report.peers[str(peer)] = {}
    if not _same_answers(plan, peer, entry):
        raise Absent("its answers in float32 are not midstream's, so nothing was timed")
    equality = Equality(plan.chat.eos_token_ids)
    ordered = sorted(plan.items, key=lambda item: item.streams)
    groups = {streams: list(group) for streams, group in groupby(ordered, key=lambda item: item.streams)}
    if plan.played or "memory" in plan.works:
        groups.setdefault(1, [])
    for streams, group in sorted(groups.items()):
        _one_group(plan, peer, streams, group, report, entry, equality)
    entry["equal"] = equality.as_dict()
    if "start" in plan.works:
        shape = Shape(plan.dtype, 1, _CONTEXT)
        launches = [plan.launcher.midstream(shape, weights=peer.weights), plan.launcher.peer(peer, shape)]
        report.add(peer, start(launches, conversation(plan.chat, SHORTEST), plan.rounds))
    if "chat" in plan.works and not plan.played:
        report.leave_out(peer, "chat", "it needs --data")


def _same_answers(plan: Plan, peer: Peer, entry: dict[str, Any]) -> bool:
    asked = questions(plan.chat, plan.launcher.infos)
    groups = checks(plan.chat, asked, plan.checked)
    if peer.adapters is None:
        groups = [group for group in groups if all(call.adapter is None for call in group)]
    shape = Shape("float32", 1, _rounded(plan.checked + 64))
    ours = plan.launcher.midstream(shape, peer.adapters or "alora")
    with started(ours, plan.launcher.peer(peer, shape, exact=True)) as pair:
        found = check(pair, groups, plan.chat.eos_token_ids)
    entry["check"] = found.as_dict()
    print(f"{peer}: {json.dumps(entry['check'])}", flush=True)
    return found.equal


def _one_group(
    plan: Plan,
    peer: Peer,
    streams: int,
    group: Sequence[Item],
    report: Report,
    entry: dict[str, Any],
    equality: Equality,
) -> None:
    """The items of so many conversations at once, on processes that were started for them."""
    alone = streams == 1
    chats = plan.played if alone and peer.adapters else ()
    longest = max((len(call.prompt) + call.tokens for item in group for call in item.calls), default=SHORTEST)
    shape = Shape(plan.dtype, streams, _CONTEXT if chats else _rounded(longest + 64))
    theirs = plan.launcher.peer(peer, shape)
    with started(plan.launcher.midstream(shape, weights=peer.weights), theirs) as pair:
        entry["facts"] = pair.facts
        _items(plan, peer, pair, group, report, equality)
        if chats:
            report.add(peer, chat_row(pair, chats, plan.chat, plan.chat_rounds, peer.adapters, equality))
        if alone and "memory" in plan.works and (found := peak_memory(pair, theirs)):
            report.memory.append({"peer": str(peer), **found})


def _items(plan: Plan, peer: Peer, pair: Pair, group: Sequence[Item], report: Report, equality: Equality) -> None:
    for item in group:
        if item.adapted and peer.adapters is None:
            report.leave_out(peer, f"{item.work}, {item.context}", "it serves no adapters")
            continue
        measure(pair, item, 1, None)  # first use of every kernel
        same = equality if peer.adapters == "alora" or not item.adapted else None
        report.add(peer, {**measure(pair, item, plan.rounds, same), "format": _formats(pair.facts)})


def _formats(facts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {name: found["format"] for name, found in facts.items()}


def _rounded(tokens: int) -> int:
    """Up to the next multiple of 256, which is llama.cpp's unit too."""
    return -(-tokens // 256) * 256


if __name__ == "__main__":
    sys.exit(main())
