"""Refusals, ends, faults and memory pressure of requests whose output invokes adapters; random mixes of them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from midstream.engine.engine import AsyncEngine
from midstream.engine.request import Job
from midstream.errors import (
    AdapterNotFound,
    Cancelled,
    ConstraintError,
    DeadlineExceeded,
    ForwardFailed,
    InputError,
    InvocationError,
    PromptTooLong,
)
from midstream.types import Choice, Completion, Regex, Request, SamplingParams
from tests.engine.invoked import (
    ADAPTERS,
    SLOT_BYTES,
    TEXT,
    Watch,
    invocable,
    running,
    sampled,
    tokens,
    verify,
    writing,
)
from tests.helpers import SEVEN, make_adapter_folder
from tests.reference import greedy, peft_model

# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("callees", "params", "error", "says"),
    [
        (invocable("lora"), {}, InputError, "plain LoRA"),
        (invocable("chek"), {}, AdapterNotFound, "did you mean check"),
        (invocable("check", closing=(1, 2)), {"max_tokens": 5}, InputError, "are 6 tokens, but max_tokens is 5"),
        (invocable("check", closing=(999,)), {}, InputError, "closing of adapter check has token id 999"),
        (invocable("ended"), {}, InvocationError, "end-of-sequence token"),
        (invocable("check", "inner"), {}, InvocationError, "check can never be invoked"),
        (invocable("check", constraint=Regex(pattern="([")), {}, ConstraintError, "regex"),
        (invocable("check", constraint=Choice(options=("longer",))), {"max_tokens": 8}, ConstraintError, "longer"),
        (invocable("check"), {"max_tokens": 2048}, PromptTooLong, "context of 2048"),
    ],
)
async def test_what_can_never_run_is_refused_and_says_why(
    calling: AsyncEngine, callees: Any, params: Any, error: Any, says: str
) -> None:
    with pytest.raises(error, match=says):
        await calling.complete(Request(prompt=TEXT, params=SamplingParams(**params), invocable=callees))


async def test_an_invocation_with_the_end_of_sequence_token_needs_ignore_eos(calling: AsyncEngine) -> None:
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    done = await calling.complete(Request(prompt=TEXT, params=params, invocable=invocable("ended")))
    assert len(done.token_ids) == 8


async def test_two_adapters_of_one_invocation_are_refused(calling: AsyncEngine, model: Any, tmp_path: Path) -> None:
    twin = make_adapter_folder(model, tmp_path / "twin", seed=50, invocation=ADAPTERS["check"]["invocation"])
    await calling.load_adapter(twin, name="twin")
    with pytest.raises(InvocationError, match="check and twin have the same invocation"):
        await calling.complete(Request(prompt=TEXT, invocable=invocable("check", "twin")))


async def test_a_score_invokes_nobody(calling: AsyncEngine) -> None:
    with pytest.raises(InputError, match="leave `invocable` out"):
        await calling.score(Request(prompt=TEXT, invocable=invocable("check")), [[1]])


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"adapter": "rate", "invocable": ({"adapter": "check"},)}, "only the base model"),
        ({"invocable": ({"adapter": "check"}, {"adapter": "check"})}, "more than once: check"),
        ({"invocable": ({"adapter": "check", "params": {"n": 2}},)}, "n must be 1"),
        ({"invocable": ({"adapter": "check", "params": {"logprobs": True}},)}, "logprobs"),
        ({"max_invocations": 0}, "greater than or equal to 1"),
    ],
)
def test_a_request_that_makes_no_sense_is_not_made(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Request.model_validate({"prompt": TEXT, **fields})


# ---------------------------------------------------------------------- ends, faults, memory

BUSY = writing("[a-e]{2}@c:[a-e]@r:[a-e]", n=2, temperature=1.0, seed=2)


async def _steps_of(engine: AsyncEngine) -> int:
    watch = Watch(engine)
    await engine.complete(BUSY)
    return watch.steps


async def test_cancelling_after_any_forward_frees_all(model: Any, callee_folders: dict[str, Path]) -> None:
    async with running(model, callee_folders) as engine:
        steps = await _steps_of(engine)
    assert steps > 10
    in_call = 0
    for k in range(1, steps):
        async with running(model, callee_folders, kv_budget_bytes=200 * SLOT_BYTES) as engine:
            core = engine._core

            def cancel(step: int, core: Any = core, k: int = k) -> None:
                nonlocal in_call
                if step == k:
                    job = next(iter(core._jobs.values()))
                    in_call += bool(job.running_calls)
                    core.cancel(job.request_id, Cancelled("enough"))
                    assert not core.scheduler.has_work
                    assert not core._digests
                    core.tree.evict_all()
                    assert core.tree.slots.num_free == core.tree.num_slots

            Watch(engine, cancel)
            with pytest.raises(Cancelled):
                await engine.complete(BUSY)
    assert in_call > 5


async def test_leaving_a_stream_within_a_call_ends_it(calling: AsyncEngine) -> None:
    callee = invocable("check", max_tokens=1500)
    stream = calling.stream(writing("[a-e]@c:[a-e]", *callee, max_tokens=1600))
    async for delta in stream:
        if ":" in delta.text:
            break
    await stream.aclose()
    stats = await calling.stats()
    assert (stats.running, stats.queued) == (0, 0)


async def test_a_deadline_that_passes_within_a_call_ends_the_request(calling: AsyncEngine) -> None:
    core = calling._core

    def expire(step: int) -> None:
        for job in core._jobs.values():
            if job.running_calls:
                job.deadline = job.started

    Watch(calling, expire)
    with pytest.raises(DeadlineExceeded):
        await calling.complete(BUSY)
    assert (await calling.stats()).running == 0


async def test_a_calls_failing_forward_ends_its_request_and_no_other(calling: AsyncEngine) -> None:
    other = Request(prompt=TEXT, params=SamplingParams(max_tokens=30, ignore_eos=True))
    expected = await calling.complete(other)
    runner = calling._loop._runner
    run = runner.run

    def fail_for_calls(step: Any) -> Any:
        if any(segment.branch.job.caller is not None for segment in step.segments):
            raise RuntimeError("out of memory")
        return run(step)

    runner.run = fail_for_calls  # type: ignore[method-assign]
    Watch(calling)
    failed, went_on = await asyncio.gather(calling.complete(BUSY), calling.complete(other), return_exceptions=True)
    assert isinstance(failed, ForwardFailed)
    assert "out of memory" in str(failed)
    assert isinstance(went_on, Completion)
    assert went_on.token_ids == expected.token_ids


async def test_a_fault_in_one_branch_of_a_step_ends_the_request_once(
    calling: AsyncEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> int:
        raise RuntimeError("a bug")

    monkeypatch.setattr("midstream.engine.core.choose", fail)
    with pytest.raises(ForwardFailed, match="a bug"):
        await calling.complete(writing("[a-e]@c:[a-e]", n=3))
    assert [record.message for record in caplog.records] == ["sampling failed"]


async def test_eviction_between_any_two_forwards_changes_no_token(
    calling: AsyncEngine, model: Any, callee_folders: dict[str, Path], peft: Any
) -> None:
    asked = sampled(7)
    expected = await calling.complete(asked)
    async with running(model, callee_folders) as pressed:
        watch = Watch(pressed, lambda _: pressed._core.tree.evict_all())
        done = await pressed.complete(asked)
    verify(watch, peft, done)
    assert [c.token_ids for c in done.choices] == [c.token_ids for c in expected.choices]
    # Prompt positions that were read again count once.
    assert done.usage.computed_tokens == len(TEXT)
    assert done.usage.cached_tokens == 0
    for call in (call for choice in done.choices for call in choice.calls):
        assert min(call.usage.cached_base_tokens, call.usage.cached_adapter_tokens) >= 0


async def test_a_kv_budget_that_holds_one_branch_delays_and_changes_nothing(
    calling: AsyncEngine, model: Any, callee_folders: dict[str, Path]
) -> None:
    requests = [sampled(seed, n=2, max_tokens=30).model_copy(update={"prompt": (seed, *TEXT)}) for seed in range(4)]
    expected = [await calling.complete(asked) for asked in requests]
    async with running(model, callee_folders, kv_budget_bytes=(len(TEXT) + 32) * SLOT_BYTES) as small:
        Watch(small)
        answers = await asyncio.gather(*(small.complete(asked) for asked in requests))
    for answer, other in zip(answers, expected, strict=True):
        assert [c.token_ids for c in answer.choices] == [c.token_ids for c in other.choices]
        assert answer.usage.cached_tokens >= 0


async def test_a_call_and_its_caller_go_before_those_that_wait(model: Any, callee_folders: dict[str, Path]) -> None:
    async with running(model, callee_folders, max_running_sequences=1) as engine:
        core, behind = engine._core, 0

        def check(step: int) -> None:
            nonlocal behind
            for job in core._jobs.values():
                if job.callees:
                    behind += len(core.scheduler.waiting) > 1
                    first = [*core.scheduler.running, *core.scheduler.waiting][0]
                    assert first.job.root is job

        Watch(engine, check)
        asked = writing("([a-e]@c:){6}", *invocable("check", max_tokens=100), max_tokens=700)
        calling = asyncio.create_task(engine.complete(asked))
        while not (await engine.stats()).running:
            await asyncio.sleep(0.001)
        others = [engine.complete(Request(prompt=TEXT, params=SamplingParams(max_tokens=3))) for _ in range(4)]
        await asyncio.gather(calling, *others)
        assert behind, "nobody waited behind a call"


async def test_calls_share_nothing_between_scopes(calling: AsyncEngine) -> None:
    asked = writing("[a-e]{2}@c:[a-e]{3}")
    first = await calling.complete(asked.model_copy(update={"cache_scope": "a"}))
    other = await calling.complete(asked.model_copy(update={"cache_scope": "b"}))
    again = await calling.complete(asked.model_copy(update={"cache_scope": "a"}))
    assert first.token_ids == other.token_ids == again.token_ids
    assert other.usage.cached_tokens == 0
    assert other.choices[0].calls[0].usage == first.choices[0].calls[0].usage
    assert again.usage.cached_tokens == len(TEXT) - 1
    assert again.choices[0].calls[0].usage.cached_adapter_tokens == 2
    assert not await calling.cache_nodes(scope="")


async def test_an_adapter_that_is_replaced_before_the_request_is_queued_is_read_anew(
    calling: AsyncEngine, model: Any, callee_folders: dict[str, Path], tmp_path: Path
) -> None:
    other = make_adapter_folder(model, tmp_path / "v2", seed=77, targets=SEVEN, invocation=tokens("@c:"))
    read = calling._reader.read
    reads = []

    def read_and_replace(*args: Any) -> Job:
        job = read(*args)
        reads.append(job)
        if len(reads) == 1:
            adapter = calling._read_adapter(other, "check")
            calling._loop.call(lambda: calling._core.add_adapter(adapter, pin=False)).result()
        return job

    calling._reader.read = read_and_replace  # type: ignore[method-assign]
    done = await calling.complete(writing("[a-e]{2}@c:[a-e]", *invocable("check")))
    call = done.choices[0].calls[0]
    asked = TEXT + done.token_ids[: call.start + 3]
    assert len(reads) == 2
    assert list(call.token_ids) == greedy(peft_model(model, {"a": other}), asked, "a", 4)


async def test_an_adapter_that_is_taken_out_meanwhile_still_answers(calling: AsyncEngine, peft: Any) -> None:
    core = calling._core

    def remove(step: int) -> None:
        if step == 1:
            core.registry.remove("check")

    watch = Watch(calling, remove)
    done = await calling.complete(writing("[a-e]{2}@c:[a-e]@c:[a-e]", *invocable("check")))
    verify(watch, peft, done)
    assert len(done.choices[0].calls) == 2
    with pytest.raises(AdapterNotFound):
        await calling.complete(writing("[a-e]{2}@c:", *invocable("check")))


# ---------------------------------------------------------------------- everything at once

PIECES = ("[a-e]{2}", "@c:", "@r:", "x", "@@c:", "[f-k]")


@st.composite
def requests(draw: st.DrawFn) -> tuple[Request, int]:
    """A request, and after which step it is cancelled (0: never)."""
    closing = draw(st.sampled_from([(), tokens(";"), tokens("@")]))
    constraint = draw(st.sampled_from([None, Regex(pattern="[a-z]{2}"), Choice(options=("y", "yy", "n"))]))
    names = draw(st.sampled_from([("check",), ("rate", "long"), ("check", "rate", "long")]))
    temperature = draw(st.sampled_from([0.0, 1.0]))
    made = writing(
        "".join(draw(st.lists(st.sampled_from(PIECES), min_size=1, max_size=6))),
        *invocable(*names, closing=closing, constraint=constraint, temperature=temperature),
        max_tokens=draw(st.sampled_from([9, 20, 40])),
        n=draw(st.integers(1, 3)),
        temperature=draw(st.sampled_from([0.0, 2.0])),
        seed=draw(st.integers(0, 5)),
        stop=draw(st.sampled_from([(), ("a",), ("c:x",)])),
    )
    update = {"prompt": TEXT[: draw(st.sampled_from([1, 20, 40]))], "max_invocations": draw(st.integers(1, 3))}
    return made.model_copy(update=update), draw(st.sampled_from([0, 0, 0, 3, 7]))


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(requests(), min_size=1, max_size=5), st.sampled_from([4, 512]), st.sampled_from([82, 130, 1000]))
def test_any_mix_of_calling_requests_gives_what_each_gives_alone(
    model: Any, callee_folders: dict[str, Path], batch: list[tuple[Request, int]], step_tokens: int, slots: int
) -> None:
    async def scenario() -> None:
        tight = {"kv_budget_bytes": slots * SLOT_BYTES, "max_step_tokens": step_tokens}
        async with running(model, callee_folders, **tight) as engine, running(model, callee_folders) as alone:
            cancels = {f"req-{i + 1}": at for i, (_, at) in enumerate(batch) if at}

            def cancel(step: int) -> None:
                for name in [name for name, at in cancels.items() if at == step]:
                    engine._core.cancel(name, Cancelled("enough"))

            Watch(engine, cancel)
            answers = await asyncio.gather(*(engine.complete(r) for r, _ in batch), return_exceptions=True)
            for (asked, cancelled), answer in zip(batch, answers, strict=True):
                if isinstance(answer, BaseException):
                    assert isinstance(answer, Cancelled)
                    assert cancelled
                    continue
                await alone.clear_cache()
                expected = await alone.complete(asked)
                assert [(c.token_ids, c.text, c.finish_reason) for c in answer.choices] == [
                    (c.token_ids, c.text, c.finish_reason) for c in expected.choices
                ]
                assert answer.usage.prompt_tokens == len(asked.prompt)
                assert 0 <= answer.usage.computed_tokens <= len(asked.prompt)

    asyncio.run(scenario())
