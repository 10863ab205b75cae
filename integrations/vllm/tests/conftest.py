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
from tests.reference import logits, peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from midstream.models.source import DEFAULT_MODEL, resolve
from prompts import LIBRARY, NUMBERS
from serving import Vllm

OLDER = "0.31.0"
TOKENS = 6
# Few slots, short steps and little KV: prompts are read in chunks beside others, and requests are preempted.
SMALL = {
    "dtype": "float32",
    "enable_lora": True,
    "max_loras": 3,
    "max_lora_rank": 16,
    "block_size": 32,
    "max_model_len": 992,
    "max_num_seqs": 6,
    "max_num_batched_tokens": 72,
    "num_gpu_blocks_override": 32,
    "disable_log_stats": False,
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What is marked so is run with the newest vLLM only: what older ones do otherwise shows in the other tests."""
    dropped = [item for item in items if OLDER in item.name and item.get_closest_marker("newest")]
    config.hook.pytest_deselected(items=dropped)
    items[:] = [item for item in items if item not in dropped]


@pytest.fixture(scope="session")
def model_folder() -> str:
    return str(resolve(DEFAULT_MODEL))


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
    """PEFT's word on answers: one reading of prompt and answer tells what it would have said at each place.

    An answer is PEFT's greedy one if each of its tokens is what PEFT finds likeliest after those before it.
    """

    def __init__(self, model_folder: str) -> None:
        torch.set_num_threads(2)
        self._base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
        self._model = self.of({name: LIBRARY / name for name in NUMBERS})
        self._known: dict[tuple[str | None, tuple[int, ...]], tuple[list[int], list[int], list[float]]] = {}

    def of(self, folders: dict[str, Path]) -> Any:
        return peft_model(self._base, folders)

    def greedy(self, call: dict[str, Any], answer: list[int]) -> list[int]:
        """The likeliest token at each place of an answer."""
        return self.judged(call, answer)[0]

    def judged(self, call: dict[str, Any], answer: list[int]) -> tuple[list[int], list[float]]:
        """The likeliest token at each place of an answer, and the log-probabilities of its own tokens."""
        name = call["adapter"] and call["adapter"][0]
        key, count = (name, tuple(call["prompt"])), len(answer)
        if key not in self._known or self._known[key][0][:count] != answer:
            self._known[key] = (answer, *judged(self._model, call["prompt"], answer, name))
        _, likeliest, logprobs = self._known[key]
        return likeliest[:count], logprobs[:count]


def judged(model: Any, prompt: list[int], answer: list[int], adapter: str | None) -> tuple[list[int], list[float]]:
    rows = logits(model, [*prompt, *answer], adapter).log_softmax(-1)[len(prompt) - 1 : -1]
    return rows.argmax(-1).tolist(), [float(row[token]) for row, token in zip(rows, answer, strict=True)]


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
