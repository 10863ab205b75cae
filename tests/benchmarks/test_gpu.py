"""The benchmark of a GPU, run whole with a tiny model on the CPU: what it claims to measure is what is computed."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import pytest
from benchmarks.gpu import Sides, measure
from benchmarks.gpu_model import INVOCATION

from midstream.types import Request, SamplingParams
from tests.reference import logits


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
        # With the same weights and adapters they give the same token, each as likely as the other has it.
        prompt, params = tuple(range(20, 60)), SamplingParams(max_tokens=1, ignore_eos=True, logprobs=True)
        found = []
        for name in ("plain", "activated", None):
            request = Request(prompt=(*prompt, *INVOCATION), adapter=name, params=params)
            answer = sides.run(sides.engine.complete(request))
            assert answer.token_ids[0] == sides.peft.label(request.prompt, name)
            found.append(answer.choices[0].logprobs[0].logprob)
            expected = logits(sides.peft._model, request.prompt, name)[-1].log_softmax(-1)
            assert found[-1] == pytest.approx(float(expected[answer.token_ids[0]]), abs=1e-5)
        assert min(abs(a - b) for a, b in itertools.combinations(found, 2)) > 1e-4
        cache = sides.peft.begin(prompt)
        assert sides.peft.decode(cache, 5, 3)[0] == sides.peft.label((*prompt, 5), None)
    finally:
        sides.close()
