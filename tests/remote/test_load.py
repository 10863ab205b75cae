"""How busy a server is, from its metrics."""

from __future__ import annotations

import pytest

from midstream.errors import BackendError
from midstream.remote.load import Load, read_load
from tests.server.running import Running

TWO_ENGINES = """
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 2.0
vllm:num_requests_running{engine="1",model_name="m"} 1.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="m"} 4.0
vllm:num_requests_waiting{engine="1",model_name="m"} 0.0
# TYPE vllm:num_requests_waiting_by_reason gauge
vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 4.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0"} 0.5
vllm:kv_cache_usage_perc{engine="1"} 0.25
"""


def test_the_engines_of_a_server_are_counted_together() -> None:
    assert read_load(TWO_ENGINES) == Load(running=3, queued=4, kv_usage=0.375)


def test_what_a_server_does_not_say_is_not_known() -> None:
    assert read_load("") == Load()


def test_what_is_no_metrics() -> None:
    with pytest.raises(BackendError):
        read_load("<html>{ x")


def test_our_own_metrics_are_read(server: Running) -> None:
    found = read_load(server.client.get("/metrics").text)
    assert (found.running, found.queued) == (0, 0)
    assert found.kv_usage is not None
