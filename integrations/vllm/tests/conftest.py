"""One environment and one engine for all tests of a version; PEFT's answers, computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.peers_build import VLLM
from benchmarks.peers_process import Worker
from benchmarks.peers_protocol import Absent
from tests.reference import greedy, logits, peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from midstream.models.source import cache_folder
from prompts import LIBRARY, NUMBERS
from serving import Vllm

OLDER = "0.31.0"
# Few slots, short steps and little KV: prompts are read in chunks beside others, and requests are preempted.
SMALL = {
    "dtype": "float32",
    "enable_lora": True,
    "max_loras": 3,
    "max_lora_rank": 16,
    "block_size": 32,
    "max_model_len": 1984,
    "max_num_seqs": 6,
    "max_num_batched_tokens": 72,
    "num_gpu_blocks_override": 64,
    "disable_log_stats": False,
}


@pytest.fixture(scope="session")
def model_folder() -> str:
    return str(cache_folder() / "models" / "smollm2-135m-instruct")


@pytest.fixture(scope="session")
def tokenizer(model_folder: str) -> Any:
    return AutoTokenizer.from_pretrained(model_folder)


@pytest.fixture(scope="session", params=[VLLM, OLDER])
def vllm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Vllm:
    try:
        return Vllm.made(request.param, tmp_path_factory.mktemp(f"vllm-{request.param}"))
    except Absent as error:
        pytest.skip(f"NOTHING OF vLLM {request.param} IS TESTED: {error}")


@pytest.fixture(scope="session")
def engine(vllm: Vllm, model_folder: str) -> Iterator[Worker]:
    with vllm.offline(model=model_folder, **SMALL) as worker:
        yield worker


class Reference:
    """PEFT's answers, each computed once."""

    def __init__(self, model_folder: str) -> None:
        torch.set_num_threads(2)
        self._base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
        self._base.generation_config.eos_token_id = None  # answers go on over it on both sides
        self._model = self.of({name: LIBRARY / name for name in NUMBERS})
        self._known: dict[tuple[str | None, tuple[int, ...], int], list[int]] = {}

    def of(self, folders: dict[str, Path]) -> Any:
        return peft_model(self._base, folders)

    def tokens(self, call: dict[str, Any], count: int) -> list[int]:
        name = call["adapter"] and call["adapter"][0]
        key = (name, tuple(call["prompt"]), count)
        if key not in self._known:
            self._known[key] = greedy(self._model, call["prompt"], name, count)
        return self._known[key]

    def logprobs(self, call: dict[str, Any], answer: list[int]) -> list[float]:
        """Log-probabilities of an answer's tokens, from one reading of prompt and answer."""
        name = call["adapter"] and call["adapter"][0]
        rows = logits(self._model, [*call["prompt"], *answer], name).log_softmax(-1)[len(call["prompt"]) - 1 : -1]
        return [float(row[token]) for row, token in zip(rows, answer, strict=True)]


@pytest.fixture(scope="session")
def peft(model_folder: str) -> Reference:
    return Reference(model_folder)


@pytest.fixture
def one(engine: Worker) -> Callable[..., dict[str, Any]]:
    """One call, alone."""

    def ask(adapter: list[Any] | None, prompt: list[int], **params: Any) -> dict[str, Any]:
        found: list[dict[str, Any]] = engine.ask(
            "generate", calls=[{"adapter": adapter, "prompt": prompt, "params": params}]
        )
        return found[0]

    return ask
