"""midstream's own side of the comparison: a worker over the public Engine."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from benchmarks.peers_protocol import Answer, Call, Setup, serve
from midstream.config import EngineConfig
from midstream.session import Engine
from midstream.types import Choice, Completion, Request, SamplingParams


class MidstreamSide:
    """All calls at once; the engine finds what they share."""

    _engine: Engine | None = None

    def load(self, setup: Setup) -> dict[str, Any]:
        config = EngineConfig(kv_budget_bytes=setup.kv_bytes)
        weights = setup.options.get("weights")
        options = {"dtype": setup.dtype, "weights": weights}
        self._engine = Engine.load(setup.model, config=config, **options, wait_for_kernels=True)
        for name, folder in setup.adapters.items():
            self._engine.load_adapter(folder, name=name)
        return {"version": version("midstream"), "format": weights or setup.dtype, "adapters": "alora"}

    def clear(self) -> None:
        self._loaded.clear_cache()

    def warm(self, prompts: Sequence[tuple[int, ...]]) -> None:
        engine = self._loaded

        async def together() -> None:
            await asyncio.gather(*map(engine.aio.warm, prompts))

        engine.run(together())

    def run(self, calls: Sequence[Call], logprobs: bool) -> list[Answer]:
        engine = self._loaded
        requests = [_request(call, logprobs) for call in calls]

        async def together() -> list[Completion]:
            return await asyncio.gather(*map(engine.aio.complete, requests))

        return [_answer(*pair) for pair in zip(calls, engine.run(together()), strict=True)]

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()

    @property
    def _loaded(self) -> Engine:
        assert self._engine is not None
        return self._engine


def _request(call: Call, logprobs: bool) -> Request:
    params = SamplingParams(max_tokens=call.tokens, ignore_eos=True, logprobs=logprobs)
    if call.label is not None:
        params = SamplingParams(constraint=Choice(options=call.label.options), logprobs=logprobs)
    return Request(prompt=call.prompt, adapter=call.adapter, params=params)


def _answer(call: Call, completion: Completion) -> Answer:
    tokens = completion.token_ids
    logprobs = tuple(item.logprob for item in completion.choices[0].logprobs or ())
    if call.label is not None:
        # The constraint appends what all options share, and what follows the decision.
        deciding = len(call.label.opening)
        tokens = (call.label.parting[call.label.options.index(completion.text)],)
        logprobs = logprobs[deciding : deciding + 1]
    return Answer(tokens, completion.usage.computed_tokens, logprobs)


if __name__ == "__main__":
    serve(MidstreamSide())
