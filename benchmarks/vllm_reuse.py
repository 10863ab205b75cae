"""vLLM with the plugin of integrations/vllm: what an adapter call costs deep in a conversation, and the plugin itself.

Time to first token of an aLoRA and of the same weights as a plain LoRA, after the base model has read the conversation;
and the base model's throughput with the plugin and without it, both with LoRA enabled. All is interleaved, and no two
engines work at once.

    python -m benchmarks.vllm_reuse --json benchmarks/results/vllm_reuse.json
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks.common import machine, write
from benchmarks.peers_build import VLLM, Builder
from benchmarks.peers_launch import Launch, Launcher, Peer, Shape, read_info
from benchmarks.peers_process import Worker
from benchmarks.peers_protocol import Call
from benchmarks.turn_sides import plain_copies
from midstream.library import library_folder
from midstream.models.source import DEFAULT_MODEL, resolve

ADAPTER = "certainty"
GOALS = {500: 5, 1500: 10, 3000: 20, 6000: 30}  # by how much an aLoRA's first token comes sooner
_BATCH, _PROMPT, _ANSWER = 8, 256, 64  # of the base model's throughput
_STREET = "The ferry leaves the harbour at seven, passes the two islands and comes back with the evening's tide. "


def main() -> None:
    options = _options()
    model = resolve(DEFAULT_MODEL, progress=True)
    library = library_folder(DEFAULT_MODEL)
    if library is None:
        raise SystemExit("run from a checkout: the benchmark needs library/")
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        both = {ADAPTER: library / ADAPTER, **plain_copies({"plain": library / ADAPTER}, scratch)}
        launcher = Launcher(
            model=model,
            root=library,
            infos={},
            threads=options.threads,
            kv_mib=options.kv_mib,
            builder=Builder(install=options.install),
            scratch=scratch,
            logs=scratch,
        )
        tokenizer = AutoTokenizer.from_pretrained(model)
        text = tokenizer.encode(_STREET * (max(options.lengths) // 15 + 1), add_special_tokens=False)
        report: dict[str, Any] = {"machine": machine(), "vllm": VLLM, "dtype": options.dtype, "rounds": options.rounds}
        shape = Shape(options.dtype, streams=_BATCH, max_tokens=max(*options.lengths, _PROMPT + _ANSWER) + 64)
        taught = _with_adapters(launcher.peer(Peer("vllm", "plugin"), shape), both)
        with taught.worker() as plugin:
            plugin.load(taught.setup)
            report["calls"] = [_calls(plugin, text, length, library, options.rounds) for length in options.lengths]
            stock = _with_adapters(launcher.peer(Peer("vllm"), shape), dict.fromkeys(both, both["plain"]))
            with stock.worker() as without:
                without.load(stock.setup)
                report["base_throughput"] = _throughput(plugin, without, text, options.rounds)
                if options.kernels:
                    report["plain_lora"] = _kernels(plugin, without, text, options.rounds)
    write(options.json, report)


def _calls(worker: Worker, text: Sequence[int], length: int, library: Path, rounds: int) -> dict[str, Any]:
    """One length's calls: seconds of each kind, and how many tokens came from the cache."""
    conversation = tuple(text[:length])
    prompt = (*conversation, *read_info(library / ADAPTER).invocation_tokens)
    seconds: dict[str, list[float]] = {ADAPTER: [], "plain": []}
    cached: dict[str, int] = {}
    for number in range(rounds + 1):  # the first is not counted
        for name in sorted(seconds, reverse=bool(number % 2)):
            worker.clear()
            worker.warm([conversation])
            ran = worker.run([Call(name, prompt, 1)])
            if number:
                seconds[name].append(ran.seconds)
            cached[name] = len(prompt) - ran.answers[0].computed
    alora, plain = (statistics.median(seconds[name]) for name in (ADAPTER, "plain"))
    print(f"{length} tokens: {alora * 1e3:.0f} ms as aLoRA, {plain * 1e3:.0f} ms as LoRA, cached {cached}", flush=True)
    return {
        "tokens": length,
        "goal": GOALS.get(length),
        "times_sooner": plain / alora,
        "alora_s": alora,
        "lora_s": plain,
        "alora_cached": cached[ADAPTER],
        "lora_cached": cached["plain"],
        "alora_all_s": seconds[ADAPTER],
        "lora_all_s": seconds["plain"],
    }


def _throughput(plugin: Worker, without: Worker, text: Sequence[int], rounds: int) -> dict[str, Any]:
    """Tokens a second of a batch of the base model's own requests: prompts nobody has read, and their answers."""
    return _compared(plugin, without, _batch(text, None), rounds, _BATCH * (_PROMPT + _ANSWER))


def _kernels(plugin: Worker, without: Worker, text: Sequence[int], rounds: int) -> dict[str, Any]:
    """The same of a plain LoRA's: the plugin's kernel and the stock one."""
    return _compared(plugin, without, _batch(text, "plain")[:2], rounds, 2 * (_PROMPT + _ANSWER))


def _batch(text: Sequence[int], adapter: str | None) -> list[Call]:
    return [Call(adapter, (100 + row, *text[row : row + _PROMPT - 1]), _ANSWER) for row in range(_BATCH)]


def _compared(plugin: Worker, without: Worker, calls: list[Call], rounds: int, tokens: int) -> dict[str, Any]:
    sides = {"plugin": plugin, "without": without}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):  # the first is not counted
        for name in sorted(sides, reverse=bool(number % 2)):
            sides[name].clear()
            ran = sides[name].run(calls)
            if number:
                seconds[name].append(ran.seconds)
    ratios = [b / a for a, b in zip(seconds["plugin"], seconds["without"], strict=True)]
    return {
        "ratio": statistics.median(ratios),
        **{f"{name}_tokens_per_s": tokens / statistics.median(found) for name, found in seconds.items()},
        **{f"{name}_all_s": found for name, found in seconds.items()},
    }


def _with_adapters(launch: Launch, adapters: dict[str, Path]) -> Launch:
    """The same launch with other adapters."""
    paths = {name: str(path) for name, path in adapters.items()}
    return replace(launch, setup=replace(launch.setup, adapters=paths))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=list(GOALS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--kv-mib", type=int, default=1024, help="memory for KV at 16 bits")
    parser.add_argument("--kernels", action="store_true", help="also a plain LoRA's throughput with both kernels")
    parser.add_argument("--no-install", dest="install", action="store_false", help="fail where vLLM is not installed")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
