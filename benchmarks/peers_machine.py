"""The machine's own limits, measured in a process of its own and printed as one JSON line."""

from __future__ import annotations

import json

import torch

from benchmarks.common import machine, matrix_throughput


def main() -> None:
    found = machine()
    found["gflop_per_s_bfloat16"] = round(matrix_throughput(torch.bfloat16), 1)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
