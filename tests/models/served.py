"""A served model against transformers' own forward of the same text."""

from __future__ import annotations

import asyncio
from typing import Any

from midstream.config import EngineConfig
from midstream.engine.engine import AsyncEngine
from midstream.models.load import LoadedModel
from midstream.types import Request, SamplingParams
from tests.reference import logits

_EXACT = 1e-3


async def check(
    model: Any, loaded: LoadedModel, step_tokens: int = 512, *, within: float = _EXACT, **config: Any
) -> None:
    """Prefill, reuse, branches and decode, each token's logits. `config`: more settings of the engine.

    Tokens are the reference's own; with a wider bound than float32's, any that is within it of the best.
    """
    prefix = tuple((13 * i + 5) % 310 + 4 for i in range(70))
    branches = [prefix + tuple(range(k, k + 4 + k // 20)) for k in (20, 60, 200)]
    engine = AsyncEngine(loaded, EngineConfig(kv_budget_bytes=4 * 1024**2, max_step_tokens=step_tokens, **config))
    try:
        await engine.warm(prefix)
        params = SamplingParams(max_tokens=8, ignore_eos=True, logprobs=True, top_logprobs=5)
        answers = await asyncio.gather(*(engine.complete(Request(prompt=p, params=params)) for p in branches))
        for prompt, answer in zip(branches, answers, strict=True):
            assert answer.usage.cached_tokens == len(prefix)
            table = logits(model, [*prompt, *answer.token_ids]).log_softmax(-1)
            assert answer.choices[0].logprobs is not None
            for i, found in enumerate(answer.choices[0].logprobs):
                row = table[len(prompt) - 1 + i]
                near_tie = within > _EXACT and float(row.max() - row[found.token_id]) < within
                assert near_tie or found.token_id == int(row.argmax())
                assert all(abs(float(row[other.token_id]) - other.logprob) < within for other in found.top)
        await engine.check_integrity()
    finally:
        await engine.aclose()
