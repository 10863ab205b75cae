"""Settings. Few, frozen, each with a unit in its name."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class EngineConfig(BaseModel):
    """How much memory and how many tokens the engine may use.

    `kv_budget_bytes` is the size of the KV pool; None takes 512 MiB or one full context, whichever is larger, and at
    most a quarter of the free memory. `max_step_tokens` bounds the tokens of one forward (chunked prefill).
    `max_running_sequences` counts branches: a request with n = 4 has four.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kv_budget_bytes: int | None = Field(default=None, gt=0)
    max_context_tokens: int | None = Field(default=None, gt=0)
    max_step_tokens: int = Field(default=512, ge=1)
    max_running_sequences: int = Field(default=64, ge=1)
    max_queued_requests: int = Field(default=1024, ge=1)
    adapter_budget_bytes: int = Field(default=2 * 1024**3, gt=0)
