"""The benchmark of a GPU, run whole with a tiny model on the CPU: what it claims to measure is what is computed."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.gpu import Sides, measure
from benchmarks.gpu_model import INVOCATION
from midstream.types import Request, SamplingParams


def test_each_side_computes_the_same_work(tmp_path: Path) -> None:
    arguments = argparse.Namespace(shape="tiny", device="cpu", dtype="float32", step_tokens=64, no_peft=False)
    sides = Sides(arguments, tmp_path, 200)
    try:
        row = measure(sides, 100, 2)
        assert row["context"] == 100
        assert {"prefill", "alora_call", "lora_call", "decode_step"} <= row["seconds"].keys()
        assert {f"peft_{key}" for key in ("prefill", "alora_call", "lora_call", "decode_step")} <= row["seconds"].keys()
        assert all(len(values) == 2 and min(values) > 0 for values in row["raw_s"].values())
        assert len(row["ratios"]) == 5
        assert sides.peft is not None
        # With the same weights and adapters they give the same tokens.
        prompt, params = tuple(range(20, 60)), SamplingParams(max_tokens=1, ignore_eos=True)
        found = []
        for name in ("lora", "alora", None):
            request = Request(prompt=(*prompt, *INVOCATION), adapter=name, params=params)
            found.append(sides.run(sides.engine.complete(request)).token_ids[0])
            assert found[-1] == sides.peft.label(request.prompt, name)
        assert len(set(found)) > 1
        cache = sides.peft.begin(prompt)
        assert sides.peft.decode(cache, 5, 3)[0] == sides.peft.label((*prompt, 5), None)
    finally:
        sides.close()
