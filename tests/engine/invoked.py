"""Adapters that a tiny base model's output invokes, and a watch on every step of the engine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import torch

from midstream.engine.engine import AsyncEngine
from midstream.engine.request import Job
from midstream.types import Completion, CompletionChoice, Invocable, InvokedCall, Regex, Request, SamplingParams
from tests.helpers import SEVEN
from tests.reference import logits
from tests.tiny import tiny_chat, tiny_engine

TEXT = tuple(range(30, 70))
EOS = tiny_chat().encode("<|im_end|>")[0]
TURN_END = tiny_chat().encode("<|im_end|>\n<|im_start|>assistant\n")
SLOT_BYTES = 256


def tokens(text: str) -> tuple[int, ...]:
    return tuple(tiny_chat().encode(text))


ADAPTERS: dict[str, dict[str, Any]] = {
    "check": {"targets": SEVEN, "invocation": tokens("@c:")},
    "rate": {"targets": ("q_proj", "down_proj"), "invocation": tokens("@r:"), "rank": 6},
    "turn": {"targets": SEVEN, "invocation": tokens("<|im_start|>judge\n")},
    "aab": {"targets": SEVEN, "invocation": tokens("aab")},
    "long": {"targets": SEVEN, "invocation": tokens("@@c:")},
    "inner": {"targets": SEVEN, "invocation": tokens("@c")},
    "ended": {"targets": SEVEN, "invocation": tokens("<|im_end|>!")},
    "lora": {"targets": SEVEN},
}


@asynccontextmanager
async def running(model: Any, folders: dict[str, Path], **config: Any) -> AsyncIterator[AsyncEngine]:
    engine = tiny_engine(model, **config)
    try:
        for name, folder in folders.items():
            await engine.load_adapter(folder, name=name)
        yield engine
        await engine.check_integrity()
        assert not engine._core.registry._uses
        await engine.clear_cache()
        assert (await engine.stats()).kv_used_bytes == 0
    finally:
        await engine.aclose()


def invocable(*names: str, closing: Sequence[int] = (), **params: Any) -> tuple[Invocable, ...]:
    params.setdefault("max_tokens", 4)
    params.setdefault("ignore_eos", "constraint" not in params)
    return tuple(Invocable(adapter=n, params=SamplingParams(**params), closing=tuple(closing)) for n in names)


def writing(pattern: str, *callees: Invocable, **params: Any) -> Request:
    """A request whose base model must write a text of this pattern."""
    params.setdefault("max_tokens", 60)
    return Request(
        prompt=TEXT,
        params=SamplingParams(constraint=Regex(pattern=pattern), **params),
        invocable=callees or invocable("check", "rate"),
    )


class Watch:
    """Checks integrity after every step, notes what was computed and sampled from, and may act in between."""

    def __init__(self, engine: AsyncEngine, after_step: Callable[[int], None] | None = None) -> None:
        self.steps = 0
        self.computed: list[tuple[Job, str | None, int, int]] = []
        self.rows: list[tuple[Job, int, int, torch.Tensor]] = []
        core, runner = engine._core, engine._loop._runner
        step, sample, run = core.step, core._sample, runner.run

        def checked_step(runner: Any) -> bool:
            core.check_integrity()
            more = step(runner)
            core.check_integrity()
            if more:
                self.steps += 1
                if after_step is not None:
                    after_step(self.steps)
                    core.check_integrity()
            return more

        def kept_sample(branch: Any, row: torch.Tensor) -> None:
            self.rows.append((branch.job, branch.index, len(branch.job.prompt) + len(branch.output), row.clone()))
            sample(branch, row)

        def kept_run(step: Any) -> Any:
            self.computed += [(s.branch.job, s.node.owner, s.position, s.count) for s in step.segments]
            return run(step)

        core.step = checked_step  # type: ignore[method-assign]
        core._sample = kept_sample  # type: ignore[method-assign]
        runner.run = kept_run  # type: ignore[method-assign]

    def forget(self) -> None:
        self.computed.clear()
        self.rows.clear()

    def count(self, *, base: bool, start: int = 0) -> int:
        """Positions from `start` on that the base model or an adapter computed."""
        return sum(
            max(0, position + count - max(position, start))
            for _, owner, position, count in self.computed
            if (owner is None) == base
        )


def verify(watch: Watch, peft: Any, done: Completion) -> None:
    """Every row that was sampled from is what PEFT and plain transformers compute from all tokens before it."""
    for choice in done.choices:
        whole = (*done.prompt_token_ids, *choice.token_ids)
        own = [(at, row) for job, index, at, row in watch.rows if job.caller is None and index == choice.index]
        assert own
        compare(own, logits(peft, whole))
        for call in choice.calls:
            _verify_call(watch, peft, done.prompt_token_ids, choice, call)


def _verify_call(watch: Watch, peft: Any, prompt: tuple[int, ...], choice: CompletionChoice, call: InvokedCall) -> None:
    invocation = ADAPTERS[call.adapter]["invocation"]
    begun = call.start + len(invocation)
    assert choice.token_ids[call.start : begun] == invocation
    assert choice.token_ids[begun : call.end] == call.token_ids
    assert tiny_chat().decode(call.token_ids) == call.text
    asked = (*prompt, *choice.token_ids[:begun])
    rows = [
        (at, row)
        for job, _, at, row in watch.rows
        if job.caller is not None and job.prompt == asked and job.caller.index == choice.index
    ]
    assert rows
    compare(rows, logits(peft, (*asked, *call.token_ids), call.adapter))


def compare(rows: list[tuple[int, torch.Tensor]], table: torch.Tensor) -> None:
    for at, row in rows:
        assert (row - table[at - 1]).abs().max() < 1e-3


def sampled(seed: int, n: int = 4, **more: Any) -> Request:
    callees = invocable("check", "rate", temperature=1.5, closing=tokens(";"))
    return writing("[a-e]{2}(@c:|@r:)[a-e]{2}@c:[a-e]{2}", *callees, n=n, temperature=9.0, seed=seed, **more)
