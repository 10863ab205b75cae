"""Prometheus metrics: vLLM's names where the meaning is the same, and reuse by owner."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from midstream.server.served import Occupancy
from midstream.types import Completion

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class Telemetry:
    """The metrics of one server, in a registry of their own."""

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        self._model = model

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(name, text, ["model_name"], registry=self.registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, ["model_name", *labels], registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, ["model_name"], buckets=buckets, registry=self.registry)

        self._running = gauge("vllm:num_requests_running", "Sequences in the batch.")
        self._waiting = gauge("vllm:num_requests_waiting", "Sequences that wait for room.")
        self._kv_usage = gauge("vllm:kv_cache_usage_perc", "Share of the KV pool in use; 1 is all of it.")
        self._queries = counter("vllm:prefix_cache_queries", "Prompt tokens looked up in the cache.")
        self._hits = counter("vllm:prefix_cache_hits", "Prompt tokens found in the cache.")
        self._prompt = counter("vllm:prompt_tokens", "Prompt tokens of finished requests.")
        self._generated = counter("vllm:generation_tokens", "Tokens of finished answers.")
        self._success = counter("vllm:request_success", "Finished answers.", "finished_reason")
        self._first = histogram("vllm:time_to_first_token_seconds", "From arrival to the first token.", _SECONDS)
        self._per_token = histogram(
            "vllm:request_time_per_output_token_seconds", "Seconds a token after the first.", _TOKEN_SECONDS
        )
        self._whole = histogram("vllm:e2e_request_latency_seconds", "From arrival to the end.", _SECONDS)
        self._reused = counter("midstream:reused_tokens", "Prompt tokens whose KV was reused, by who calls.", "owner")
        self._computed = counter("midstream:computed_tokens", "Prompt tokens computed, by who calls.", "owner")
        self._refused = counter("midstream:refused_requests", "Requests that ended with an error.", "code")
        self._flows = counter(
            "midstream:flows", "Flows by how they ended: ended, left, or an error's code.", "flow", "outcome"
        )
        self.queried_tokens = 0
        self.hit_tokens = 0

    def finished(self, completion: Completion) -> None:
        """Count a finished request."""
        name, usage, owner = self._model, completion.usage, completion.adapter or "base"
        self.queried_tokens += usage.prompt_tokens
        self.hit_tokens += usage.cached_tokens
        self._queries.labels(name).inc(usage.prompt_tokens)
        self._hits.labels(name).inc(usage.cached_tokens)
        self._prompt.labels(name).inc(usage.prompt_tokens)
        self._generated.labels(name).inc(usage.completion_tokens)
        self._reused.labels(name, owner).inc(usage.cached_tokens)
        self._computed.labels(name, owner).inc(usage.computed_tokens)
        for choice in completion.choices:
            self._success.labels(name, choice.finish_reason).inc()
            for call in choice.calls:
                self._reused.labels(name, call.adapter).inc(call.usage.cached_tokens)
                self._computed.labels(name, call.adapter).inc(call.usage.computed_tokens)
        self._whole.labels(name).observe(completion.seconds)
        if completion.time_to_first_token_s is not None:
            self._first.labels(name).observe(completion.time_to_first_token_s)
            longest = max(len(choice.token_ids) for choice in completion.choices)
            if longest > 1:
                rest = completion.seconds - completion.time_to_first_token_s
                self._per_token.labels(name).observe(rest / (longest - 1))

    def flow_ended(self, flow: str, outcome: str) -> None:
        """Count a flow."""
        self._flows.labels(self._model, flow, outcome).inc()

    def refused(self, code: str) -> None:
        """Count a request that ended with an error."""
        self._refused.labels(self._model, code).inc()

    def exposition(self, now: Occupancy) -> bytes:
        """The metrics as Prometheus reads them. A figure that is not known now is left out."""
        for gauge, value in (
            (self._running, now.running),
            (self._waiting, now.queued),
            (self._kv_usage, now.kv_usage),
        ):
            gauge.clear()
            if value is not None:
                gauge.labels(self._model).set(value)
        return generate_latest(self.registry)
