"""Known faults of other engines, by their number in our list of the field; each test fails on its fault."""

from __future__ import annotations

import asyncio
import copy
from pathlib import Path
from typing import Any

import pytest

from midstream.engine.engine import AsyncEngine
from midstream.errors import AdapterFormatError, InputError, InvocationError, PromptTooLong
from midstream.types import Chat, Completion, Message, Request, SamplingParams
from tests.engine.conftest import loaded
from tests.helpers import make_adapter_folder, tiny_llama
from tests.reference import greedy, peft_model
from tests.tiny import tiny_chat, tiny_engine

TEXT = tuple(range(30, 80))
CALL = (300,)
PARAMS = SamplingParams(max_tokens=6, ignore_eos=True, logprobs=True)


async def ask(engine: AsyncEngine, prompt: tuple[int, ...], adapter: str | None = None) -> Completion:
    return await engine.complete(Request(prompt=prompt, adapter=adapter, params=PARAMS))


async def cold(model: Any, folders: dict[str, Path], prompt: tuple[int, ...], adapter: str | None) -> Completion:
    engine = await loaded(model, folders)
    try:
        return await ask(engine, prompt, adapter)
    finally:
        await engine.aclose()


def same(one: Completion, other: Completion) -> None:
    a, b = one.choices[0], other.choices[0]
    assert a.token_ids == b.token_ids
    assert a.logprobs is not None
    assert b.logprobs is not None
    assert max(abs(x.logprob - y.logprob) for x, y in zip(a.logprobs, b.logprobs, strict=True)) < 1e-3


async def test_1_a_missing_invocation_is_an_error(engine: AsyncEngine) -> None:
    with pytest.raises(InvocationError, match=r"alora is invoked by \[300\]"):
        await ask(engine, TEXT, "alora")


async def test_2_and_17_base_after_an_adapter_inherits_nothing(
    engine: AsyncEngine, model: Any, folders: dict[str, Path]
) -> None:
    for adapter in ("alora", "lora"):
        await ask(engine, TEXT + CALL, adapter)
        base = await ask(engine, TEXT + CALL)
        assert base.usage.cached_adapter_tokens == 0
        same(base, await cold(model, folders, TEXT + CALL, None))


async def test_3_a_reloaded_adapter_has_no_stale_hit(model: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    engine = await loaded(model, folders)
    try:
        await ask(engine, TEXT + CALL, "alora")
        other = make_adapter_folder(model, tmp_path / "v2", seed=99, targets=("q_proj", "up_proj"), invocation=CALL)
        await engine.load_adapter(other, name="alora")
        warm = await ask(engine, TEXT + CALL, "alora")
        assert warm.usage.cached_tokens == len(TEXT)
        assert list(warm.token_ids) == greedy(peft_model(model, {"a": other}), TEXT + CALL, "a", 6)
    finally:
        await engine.aclose()


async def test_4_and_18_adapters_never_hit_each_others_kv(
    engine: AsyncEngine, model: Any, folders: dict[str, Path]
) -> None:
    prompt = (*TEXT, 300, 304)
    await ask(engine, prompt, "alora")
    third = await ask(engine, prompt, "third")
    assert third.usage.cached_tokens == len(TEXT)
    same(third, await cold(model, folders, prompt, "third"))


async def test_5_a_partial_match_is_retried(model: Any, tmp_path: Path) -> None:
    folder = make_adapter_folder(model, tmp_path / "aab", invocation=(7, 7, 8))
    engine = tiny_engine(model)
    try:
        await engine.load_adapter(folder, name="aab")
        prompt = (*TEXT, 7, 7, 7, 8)
        answer = await ask(engine, prompt, "aab")
        assert answer.activation_index == len(TEXT) + 1
        assert list(answer.token_ids) == greedy(peft_model(model, {"a": folder}), prompt, "a", 6)
    finally:
        await engine.aclose()


async def test_6_the_last_occurrence_counts(engine: AsyncEngine) -> None:
    answer = await ask(engine, CALL + TEXT + CALL + TEXT[:3], "alora")
    assert answer.activation_index == 1 + len(TEXT)


async def test_8_batching_does_not_shift_activation(engine: AsyncEngine, model: Any, folders: dict[str, Path]) -> None:
    prompts = [TEXT[:length] + CALL for length in (1, 50, 13)]
    answers = await asyncio.gather(*(ask(engine, prompt, "alora") for prompt in prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.activation_index == len(prompt) - 1
        same(answer, await cold(model, folders, prompt, "alora"))


async def test_10_and_21_an_invocation_that_merged_with_its_neighbour_is_shown(model: Any, tmp_path: Path) -> None:
    folder = make_adapter_folder(model, tmp_path / "a", invocation=(65, 66, 67))
    engine = tiny_engine(model)
    try:
        await engine.load_adapter(folder, name="a")
        with pytest.raises(InvocationError, match=r"nearest, at token 50, it has \[65, 66, 10"):
            await ask(engine, (*(9,) * 50, 65, 66, 10, 11), "a")
    finally:
        await engine.aclose()


async def test_11_concurrent_calls_run_in_the_same_forwards(engine: AsyncEngine) -> None:
    await engine.warm(TEXT)
    before = (await engine.stats()).forwards
    await asyncio.gather(*(ask(engine, TEXT + CALL, "alora") for _ in range(8)))
    assert (await engine.stats()).forwards - before < 2 * PARAMS.max_tokens


async def test_13_what_can_never_fit_is_refused_at_once_with_the_numbers(model: Any, folders: dict[str, Path]) -> None:
    engine = await loaded(model, folders, kv_budget_bytes=64 * 256)
    try:
        with pytest.raises(PromptTooLong, match=r"prompt has 60 tokens.*6 more.*holds 64 tokens"):
            await ask(engine, tuple(range(60)))
        with pytest.raises(PromptTooLong, match="context of 2048"):
            await ask(engine, (1,) * 2048)
        assert (await ask(engine, TEXT)).text is not None
    finally:
        await engine.aclose()


async def test_14_and_23_an_adapter_of_another_model_is_refused(model: Any, tmp_path: Path) -> None:
    engine = tiny_engine(model)
    try:
        wide = make_adapter_folder(tiny_llama(hidden=64), tmp_path / "wide")
        with pytest.raises(AdapterFormatError, match="this base model and rank need"):
            await engine.load_adapter(wide)
        config = (tmp_path / "wide" / "adapter_config.json").read_text().replace("q_proj", "query")
        (tmp_path / "wide" / "adapter_config.json").write_text(config.replace("k_proj", "key").replace("v_proj", "val"))
        with pytest.raises(AdapterFormatError, match="match no linear layer"):
            await engine.load_adapter(wide)
    finally:
        await engine.aclose()


async def test_16_two_requests_of_one_adapter_the_second_cold(
    engine: AsyncEngine, model: Any, folders: dict[str, Path]
) -> None:
    prompts = [TEXT + CALL, tuple(reversed(TEXT)) + CALL]
    await ask(engine, prompts[0], "alora")
    answers = await asyncio.gather(*(ask(engine, prompt, "alora") for prompt in prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        same(answer, await cold(model, folders, prompt, "alora"))


async def test_19_an_invocation_at_the_first_token_is_the_same_warm_and_cold(engine: AsyncEngine) -> None:
    first = await ask(engine, CALL + TEXT, "alora")
    second = await ask(engine, CALL + TEXT, "alora")
    assert second.usage.computed_tokens == 1
    same(first, second)


async def test_20_a_request_has_one_adapter_or_none() -> None:
    with pytest.raises(ValueError, match="adapter"):
        Request(prompt=TEXT, adapter=["alora", "lora"])  # type: ignore[arg-type]


async def test_22_an_adapters_output_in_the_history_is_re_read(
    engine: AsyncEngine, model: Any, folders: dict[str, Path]
) -> None:
    first = await ask(engine, TEXT + CALL, "alora")
    history = TEXT + CALL + first.token_ids
    for adapter, call in ((None, ()), ("other", (301, 302, 303))):
        prompt = history + call + (9,)
        warm = await ask(engine, prompt, adapter)
        assert warm.usage.cached_adapter_tokens == 0
        same(warm, await cold(model, folders, prompt, adapter))


async def test_24_adapters_that_alternate_quickly_on_one_conversation(
    engine: AsyncEngine, model: Any, folders: dict[str, Path]
) -> None:
    calls = {"alora": CALL, "other": (301, 302, 303), "third": (300, 304), "lora": (), None: ()}
    expected = {name: await cold(model, folders, TEXT + call, name) for name, call in calls.items()}
    for round_ in range(6):
        names = [list(calls)[(i * 3 + round_) % len(calls)] for i in range(15)]
        answers = await asyncio.gather(*(ask(engine, TEXT + calls[name], name) for name in names))
        for name, answer in zip(names, answers, strict=True):
            same(answer, expected[name])


async def test_invoke_appends_the_invocation_to_a_chat(model: Any, tmp_path: Path) -> None:
    invocation = tiny_chat().encode("<|im_start|>check\n")
    folder = make_adapter_folder(copy.deepcopy(model), tmp_path / "check", invocation=invocation)
    engine = tiny_engine(model)
    try:
        await engine.load_adapter(folder)
        chat = Chat(messages=(Message(role="user", content="hello"),))
        answer = await engine.complete(Request(prompt=chat, adapter="check", invoke=True, params=PARAMS))
        assert answer.activation_index == len(tiny_chat().history(chat))
        with pytest.raises(InputError):
            await engine.complete(Request(prompt=chat, adapter="check", params=PARAMS))
        with pytest.raises(InvocationError, match="needs an adapter"):
            await engine.complete(Request(prompt=chat, invoke=True, params=PARAMS))
    finally:
        await engine.aclose()
