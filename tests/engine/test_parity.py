"""The engine against stock PEFT: greedy tokens identical, logits within 1e-3 in float32."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from midstream.engine.engine import AsyncEngine
from midstream.types import Request, SamplingParams
from tests.helpers import SEVEN, make_adapter_folder, tiny_llama
from tests.reference import greedy, logits, peft_model
from tests.tiny import tiny_engine

ONE = (300,)
EIGHT = (256, 71, 72, 73, 71, 72, 73, 74)
TEXT = [int(t) for t in torch.randint(0, 250, (60,), generator=torch.Generator().manual_seed(1))]

CASES = {
    "alora on q, k, v": {"targets": ("q_proj", "k_proj", "v_proj"), "invocation": EIGHT},
    "alora on one target": {"targets": ("down_proj",), "invocation": ONE},
    "alora on all seven": {"targets": SEVEN, "invocation": EIGHT},
    "alora with mixed ranks and rslora": {
        "targets": SEVEN,
        "invocation": ONE,
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7},
        "alpha_pattern": {"v_proj": 3},
        "use_rslora": True,
    },
    "lora on all seven": {"targets": SEVEN},
    "lora on one target": {"targets": ("o_proj",)},
}


def placements(invocation: Sequence[int] | None) -> dict[str, list[int]]:
    if invocation is None:
        return {"plain": TEXT, "short": TEXT[:3]}
    call = list(invocation)
    return {
        "at the end": TEXT + call,
        "at the first token": [*call, *TEXT[:5]],
        "in the middle": TEXT[:30] + call + TEXT[30:],
        "twice": TEXT[:10] + call + TEXT[10:20] + call,
        "followed by user text": TEXT + call + TEXT[:17],
        "nothing else": call,
    }


async def check(engine: AsyncEngine, reference: Any, prompt: list[int], adapter: str | None) -> None:
    expected = logits(reference, prompt, adapter).log_softmax(-1)
    scored = await engine.score(Request(prompt=tuple(prompt), adapter=adapter), [[t] for t in range(0, 320, 9)])
    ours = torch.tensor([row[0] for row in scored.logprobs])
    assert (ours - expected[-1, ::9]).abs().max() < 1e-3
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    answer = await engine.complete(Request(prompt=tuple(prompt), adapter=adapter, params=params))
    assert list(answer.token_ids) == greedy(reference, prompt, adapter, 12)


@pytest.mark.parametrize("case", CASES)
async def test_greedy_tokens_and_logits_equal_pefts(case: str, tmp_path: Path) -> None:
    model = tiny_llama()
    folder = make_adapter_folder(model, tmp_path / "a", **CASES[case])
    reference = peft_model(model, {"a": folder})
    engine = tiny_engine(model)
    try:
        info = await engine.load_adapter(folder, name="a")
        assert info.kind == ("alora" if "alora" in case else "lora")
        for prompt in placements(CASES[case].get("invocation")).values():
            await check(engine, reference, prompt, "a")
            await check(engine, reference, prompt, None)
            await check(engine, reference, prompt, "a")
        await engine.check_integrity()
    finally:
        await engine.aclose()


async def test_a_mixed_batch_equals_each_request_alone(tmp_path: Path) -> None:
    """Base, two LoRAs and three aLoRAs, prefill and decode together, in steps of a few tokens."""
    import asyncio

    model = tiny_llama()
    settings = {
        "lora1": {"targets": SEVEN, "rank": 3},
        "lora2": {"targets": ("q_proj", "down_proj"), "rank": 8},
        "alora1": {"targets": SEVEN, "invocation": ONE},
        "alora2": {"targets": ("k_proj",), "invocation": EIGHT, "rank": 2},
        "alora3": {"targets": SEVEN, "invocation": (301, 302), "rank": 6},
    }
    folders = {n: make_adapter_folder(model, tmp_path / n, seed=i, **s) for i, (n, s) in enumerate(settings.items())}
    reference = peft_model(model, folders)
    for step_tokens in (7, 64):
        engine = tiny_engine(model, max_step_tokens=step_tokens)
        try:
            for name, folder in folders.items():
                await engine.load_adapter(folder, name=name)
            requests = []
            for i, name in enumerate([None, *folders, None, *reversed(folders)]):
                invocation = [] if name is None else settings[name].get("invocation", [])
                prompt = TEXT[: 40 + i] + list(invocation) + TEXT[: i % 4]
                params = SamplingParams(max_tokens=5 + i, ignore_eos=True)
                requests.append(Request(prompt=tuple(prompt), adapter=name, params=params))
            answers = await asyncio.gather(*(engine.complete(r) for r in requests))
            for request, answer in zip(requests, answers, strict=True):
                expected = greedy(reference, request.prompt, request.adapter, request.params.max_tokens)
                assert list(answer.token_ids) == expected
            await engine.check_integrity()
        finally:
            await engine.aclose()
