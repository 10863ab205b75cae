"""What bytes and operations allow, beside what was measured; and what larger models on larger machines would give.

A step is taken to last as long as the longer of two things: reading what it must read (the weights once, the KV that
its rows see once) at the measured bandwidth, and computing what it must compute at the measured matrix throughput.
Nothing is fitted: the only two numbers of a machine are its ceilings, measured by `--measure` or, for machines that
were not at hand, its maker's figures times the shares below. Several GPUs count as one of their summed ceilings,
without what they say to each other.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import machine, matrix_throughput, read_bandwidth, write

RESULTS = Path(__file__).parent / "results"
# Of a maker's figures: what well-written kernels reach on such machines.
_SHARE_OF_BANDWIDTH, _SHARE_OF_COMPUTE = 0.8, 0.6


@dataclass(frozen=True, slots=True)
class Shape:
    """A decoder of the common kind: grouped queries, gated perceptron, `bytes` a number of weights and KV."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    dim: int
    intermediate: int
    vocab: int
    bytes: int = 2

    @property
    def layer_weights(self) -> int:
        """Numbers in the linear layers of all layers: what each token is multiplied with."""
        attention = self.hidden * self.dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def head_weights(self) -> int:
        return self.hidden * self.vocab

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * self.layers * self.kv_heads * self.dim * self.bytes

    def read_bytes(self, seen: int, *, head: bool = True) -> int:
        """Bytes that a step reads at least, whose rows see `seen` tokens of KV in all."""
        weights = self.layer_weights + (self.head_weights if head else 0)
        return weights * self.bytes + seen * self.kv_bytes_per_token

    def operations(self, start: int, end: int) -> int:
        """Multiplications and additions of computing the tokens from `start` to `end` behind `start` others."""
        rows = end - start
        pairs = rows * start + rows * (rows + 1) // 2
        return 2 * rows * self.layer_weights + 4 * pairs * self.layers * self.heads * self.dim + 2 * self.head_weights


@dataclass(frozen=True, slots=True)
class Machine:
    name: str
    bytes_per_s: float
    operations_per_s: float

    def forward_s(self, shape: Shape, start: int, end: int) -> float:
        """Seconds of computing the tokens from `start` to `end`: whichever of reading and computing takes longer."""
        reading = shape.read_bytes(end) / self.bytes_per_s
        return max(reading, shape.operations(start, end) / self.operations_per_s)

    def decode_s(self, shape: Shape, depth: int) -> float:
        return self.forward_s(shape, depth, depth + 1)

    def call_s(self, shape: Shape, context: int, invocation: int, *, shared: bool) -> float:
        """An adapter's label answer behind a context: its invocation alone where the prefix is shared, else all."""
        return self.forward_s(shape, context if shared else 0, context + invocation)


SMALL = Shape("SmolLM2-135M", 30, 576, 9, 3, 64, 1536, 49152)
LARGE = (
    Shape("8B (Granite 3.3's shape)", 40, 4096, 32, 8, 128, 12800, 49159),
    Shape("70B (Llama 3.3's shape)", 80, 8192, 64, 8, 128, 28672, 128256),
)
# NVIDIA H100 SXM: 3.35 TB/s and 989 TFLOP/s of dense bfloat16 each.
_H100 = (3.35e12 * _SHARE_OF_BANDWIDTH, 989e12 * _SHARE_OF_COMPUTE)
GPUS = (Machine("one H100", *_H100), Machine("eight H100", 8 * _H100[0], 8 * _H100[1]))
_INVOCATION = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="measure this machine's ceilings anew")
    arguments = parser.parse_args()
    if arguments.measure:
        found = {
            "machine": machine(),
            "read_gb_per_s": max(read_bandwidth() for _ in range(5)),
            "gflop_per_s": max(matrix_throughput(torch.bfloat16) for _ in range(5)),
        }
        write(RESULTS / "ceilings.json", found)
    print(here())
    print(elsewhere())


def here() -> str:
    """Predicted beside measured on the machine of the results, as Markdown."""
    ceilings = _read("ceilings")
    local = Machine("here", ceilings["read_gb_per_s"] * 1e9, ceilings["gflop_per_s"] * 1e9)
    rows = ["| work | predicted | measured | measured / predicted |", "|---|---|---|---|"]
    for row in _read("decode-bfloat16")["rows"]:
        rows.append(
            _line(f"decode step at {row['depth']:,} tokens", local.decode_s(SMALL, row["depth"]), row["step_s"])
        )
    for row in _read("call")["rows"]:
        context = row["context"]
        whole, shared = (local.call_s(SMALL, context, _INVOCATION, shared=flag) for flag in (False, True))
        rows.append(_line(f"label call at {context:,} tokens, plain LoRA", whole, row["lora_s"]))
        rows.append(_line(f"label call at {context:,} tokens, aLoRA", shared, row["alora_s"]))
    return "\n".join(rows) + "\n"


def _line(work: str, predicted: float, measured: float) -> str:
    return f"| {work} | {1e3 * predicted:,.1f} ms | {1e3 * measured:,.1f} ms | {measured / predicted:.1f} |"


def elsewhere() -> str:
    """What larger models would give; nothing of it was measured."""
    head = "| predicted, not measured | context | decode step | LoRA label call | aLoRA label call | ratio | KV |"
    rows = [head, "|---|---|---|---|---|---|---|"]
    for shape in LARGE:
        for gpu in GPUS:
            if shape.read_bytes(0) > (80e9 if gpu is GPUS[0] else 640e9):
                rows.append(f"| {shape.name}, {gpu.name} | | does not fit | | | | |")
                continue
            for context in (4096, 16384, 65536):
                whole, shared = (gpu.call_s(shape, context, _INVOCATION, shared=flag) for flag in (False, True))
                times = f"{1e3 * gpu.decode_s(shape, context):.1f} ms | {1e3 * whole:,.0f} ms | {1e3 * shared:.1f} ms"
                kv = context * shape.kv_bytes_per_token / 1e9
                rows.append(
                    f"| {shape.name}, {gpu.name} | {context:,} | {times} | {whole / shared:,.0f} | {kv:.1f} GB |"
                )
    return "\n".join(rows) + "\n"


def _read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
