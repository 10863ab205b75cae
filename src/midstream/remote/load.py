"""How busy a server is, read from its Prometheus metrics. midstream and vLLM name them alike."""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from midstream.errors import BackendError


@dataclass(frozen=True, slots=True)
class Load:
    """Requests that run and that wait; `kv_usage` is the share of the KV memory in use. None: the server says nothing.

    A server of several engines counts all of them, and `kv_usage` is their mean.
    """

    running: int | None = None
    queued: int | None = None
    kv_usage: float | None = None


def read_load(text: str) -> Load:
    """Raises BackendError for a text that holds no metrics."""
    try:
        samples = [(s.name, s.value) for family in text_string_to_metric_families(text) for s in family.samples]
    except ValueError as error:
        raise BackendError(f"the metrics cannot be read: {error}") from error
    running, queued, usage = (
        [value for found, value in samples if found == f"vllm:{name}"]
        for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    )
    return Load(
        running=int(sum(running)) if running else None,
        queued=int(sum(queued)) if queued else None,
        kv_usage=sum(usage) / len(usage) if usage else None,
    )
