"""Prompt tokens by who owns them, as counters in vLLM's own /metrics."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from prometheus_client import Counter

from midstream_vllm.ownership import owner_of, split_prompt

_LABELS = ("adapter", "owner")


@lru_cache(maxsize=1)
def _counters() -> dict[str, Counter]:
    """Made at the first use: by then vLLM has said whether several processes count together."""
    return {
        "prompt": Counter(
            "midstream:prompt_tokens", "Prompt tokens of finished requests, by who owns their KV.", _LABELS
        ),
        "cached": Counter("midstream:cached_prompt_tokens", "Those of them that came from the prefix cache.", _LABELS),
    }


@lru_cache(maxsize=4096)
def _child(what: str, adapter: str, owner: str) -> Any:
    return _counters()[what].labels(adapter=adapter, owner=owner)


def count_finished(state: Any, params: Any) -> None:
    """Count a finished request of vLLM's output processor. `adapter` is empty for a request of the base model."""
    owner = owner_of(state.lora_request, params)
    adapter = "" if state.lora_name is None else state.lora_name.rpartition("@")[0] or state.lora_name
    start = owner.start if owner is not None else None if state.lora_name is None else 0
    for (who, what), tokens in split_prompt(state.prompt_len, state.num_cached_tokens, start).items():
        if tokens:
            _child(what, adapter, who).inc(tokens)
