"""vLLM with the plugin against PEFT, in float32, with few slots, short steps and little KV."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from benchmarks.peers_process import Worker, WorkerError
from benchmarks.turn_sides import plain_copies

from conftest import TOKENS, Reference, judged
from prompts import ALORAS, LIBRARY, LORA, adapter, calls, conversations, invocation
from serving import edited

One = Callable[..., dict[str, Any]]
BLOCK = 32


def test_two_aloras_a_lora_and_the_base_model_in_one_batch_answer_as_peft_does(
    engine: Worker, peft: Reference, tokenizer: Any
) -> None:
    asked = calls(tokenizer, TOKENS)
    engine.ask("clear")
    for call, found in zip(asked, engine.ask("generate", calls=asked), strict=True):
        (answer,) = found["tokens"]
        likeliest, logprobs = peft.judged(call, answer)
        assert answer == likeliest, call["adapter"]
        assert found["logprobs"][0] == pytest.approx(logprobs, abs=1e-3)


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.newest) for seed in range(2, 10))])
def test_answers_do_not_depend_on_the_order_of_the_calls(
    engine: Worker, peft: Reference, tokenizer: Any, seed: int
) -> None:
    asked = calls(tokenizer, 3)
    random.Random(seed).shuffle(asked)
    if seed % 2:  # the others meet what earlier orders have left in the cache
        engine.ask("clear")
    for call, found in zip(asked, engine.ask("generate", calls=asked), strict=True):
        assert found["tokens"][0] == peft.greedy(call, found["tokens"][0]), call["adapter"]


def test_turns_of_base_and_adapters_follow_each_other(
    engine: Worker, one: One, peft: Reference, tokenizer: Any
) -> None:
    """Each reads the other's output again, and none gets KV that the other has computed."""
    engine.ask("clear")
    text = conversations(tokenizer)[8]
    for name in [None, ALORAS[0], None, ALORAS[1], LORA, ALORAS[0], None]:
        prompt = text + ([] if name is None else invocation(name))
        call = {"adapter": name and adapter(name), "prompt": prompt}
        found = one(call["adapter"], prompt, max_tokens=TOKENS)
        assert found["tokens"][0] == peft.greedy(call, found["tokens"][0]), name
        text = prompt + found["tokens"][0]


@pytest.mark.parametrize("length", [500, 900])
def test_an_alora_reuses_all_whole_blocks_before_its_activation(
    engine: Worker, one: One, tokenizer: Any, tmp_path: Path, length: int
) -> None:
    engine.ask("clear")
    text = [token for conversation in conversations(tokenizer) for token in conversation][: length - 1]
    text = (text * 3)[:length]
    one(None, text, max_tokens=1)
    for name in ALORAS:
        found = one(adapter(name), text + invocation(name), max_tokens=1)
        assert found["cached"] == length // BLOCK * BLOCK
    plain = plain_copies({"certainty": LIBRARY / "certainty"}, tmp_path)["certainty"]
    found = one(["plain", 9, str(plain)], text + invocation("certainty"), max_tokens=1)
    assert found["cached"] == 0


@pytest.mark.newest
def test_an_invocation_at_the_very_start_shares_nothing(engine: Worker, one: One, peft: Reference) -> None:
    engine.ask("clear")
    prompt = invocation("certainty") + list(range(400, 480))
    one(None, prompt, max_tokens=1)
    call = {"adapter": adapter("certainty"), "prompt": prompt}
    for cached in (0, 64):
        found = one(call["adapter"], prompt, max_tokens=TOKENS)
        assert found["cached"] == cached
        assert found["tokens"][0] == peft.greedy(call, found["tokens"][0])


def test_preempted_requests_are_answered_as_if_alone(engine: Worker, one: One, tokenizer: Any) -> None:
    every = calls(tokenizer, 110)
    asked = [every[4 * number + number % 4] for number in range(6)]  # each on a conversation of its own
    engine.ask("clear")
    before = engine.ask("metric", name="vllm:num_preemptions")
    together = engine.ask("generate", calls=asked)
    assert engine.ask("metric", name="vllm:num_preemptions") > before
    engine.ask("clear")
    for call, found in list(zip(asked, together, strict=True))[::3]:
        assert found["tokens"] == one(call["adapter"], call["prompt"], max_tokens=110)["tokens"]


@pytest.mark.newest
def test_several_answers_to_one_prompt(one: One, peft: Reference, tokenizer: Any) -> None:
    # Without a seed: seeded requests whose prompt is read in parts end vLLM's CPU engine.
    call = calls(tokenizer, TOKENS)[0]
    # So hot and long that nobody would see five equal ones.
    found = one(call["adapter"], call["prompt"], max_tokens=4 * TOKENS, temperature=2.0, n=5)
    assert len({tuple(tokens) for tokens in found["tokens"]}) > 1
    for number, tokens in enumerate(found["tokens"]):
        assert found["logprobs"][number] == pytest.approx(peft.judged(call, tokens)[1], abs=1e-3)


@pytest.mark.newest
def test_structured_outputs_choose_what_the_adapter_finds_likelier(one: One, peft: Reference, tokenizer: Any) -> None:
    # One token decides: which of the two is likelier at the first place is PEFT's word.
    for call in calls(tokenizer, 1)[:4]:
        first = {text: tokenizer.encode(text)[0] for text in ("yes", "no")}
        scores = {text: peft.judged(call, [token])[1][0] for text, token in first.items()}
        found = one(call["adapter"], call["prompt"], max_tokens=4, choice=["yes", "no"], ignore_eos=False)
        assert found["texts"] == [max(scores, key=lambda text: scores[text])]


def test_a_reload_under_the_same_name_meets_no_kv_of_the_old_weights(
    engine: Worker, one: One, peft: Reference, tokenizer: Any, tmp_path: Path
) -> None:
    folder = edited(LIBRARY / "certainty", tmp_path / "mine", 1)
    asked = ["mine", 7, str(folder)]
    prompt = conversations(tokenizer)[9] + invocation("certainty")
    # The adapter owns two blocks of its own, so that KV of the old weights is there to be met.
    long = [*prompt, *list(range(300, 370))]
    engine.ask("add_lora", adapter=asked)
    old = one(asked, long, max_tokens=TOKENS)["tokens"][0]
    assert old == peft.greedy({"adapter": adapter("certainty"), "prompt": long}, old)
    assert one(asked, long, max_tokens=1)["cached"] > len(prompt)

    edited(LIBRARY / "certainty", folder, 8)
    assert one(asked, long, max_tokens=TOKENS)["tokens"][0] == old  # a folder is read when it is loaded
    engine.ask("add_lora", adapter=asked)
    found = one(asked, long, max_tokens=TOKENS)
    assert found["cached"] == (len(prompt) - 3) // BLOCK * BLOCK  # the base model's blocks, and no other
    (new,) = found["tokens"]
    assert new == judged(peft.of({"mine": folder}), long, new, "mine")[0]
    assert new != old
    assert 7 in engine.ask("list_loras")


def test_a_prompt_without_the_invocation_is_an_error_and_the_engine_goes_on(one: One, tokenizer: Any) -> None:
    text = conversations(tokenizer)[0]
    with pytest.raises(WorkerError, match=r"InvocationMissing: adapter certainty is invoked by .*certainty"):
        one(adapter("certainty"), text, max_tokens=1)
    # The start of the invocation is there, and a token that merged with what follows.
    with pytest.raises(WorkerError, match=r"InvocationMissing: .*nearest, at token"):
        one(adapter("certainty"), [*text, *invocation("certainty")[:2], 216], max_tokens=1)
    assert len(one(None, text, max_tokens=2)["tokens"][0]) == 2


@pytest.mark.newest
def test_broken_folders_are_refused_with_all_that_is_wrong(one: One, tokenizer: Any, tmp_path: Path) -> None:
    prompt = conversations(tokenizer)[0] + invocation("certainty")
    folder = tmp_path / "broken"
    shutil.copytree(LIBRARY / "certainty", folder)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())

    path.write_text(json.dumps(config | {"use_dora": True, "bias": "all", "alora_invocation_tokens": [49999]}))
    with pytest.raises(WorkerError) as refused:
        one(["broken", 11, str(folder)], prompt, max_tokens=1)
    for said in ("AdapterRefused", "use_dora", "bias", "49999"):
        assert said in str(refused.value)

    path.write_text(json.dumps(config | {"target_modules": ["query"]}))
    with pytest.raises(WorkerError, match="match no linear layer of this base model"):
        one(["broken", 11, str(folder)], prompt, max_tokens=1)

    with pytest.raises(WorkerError, match="AdapterRefused"):
        one(["nowhere", 12, str(tmp_path / "nowhere")], prompt, max_tokens=1)
    assert len(one(None, prompt, max_tokens=2)["tokens"][0]) == 2
