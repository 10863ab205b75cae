"""OpenTelemetry spans where its SDK is installed; nothing where it is not."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

log = logging.getLogger(__name__)

# Looked up in this order: the second fails where there is no such package at all.
_AVAILABLE = all(importlib.util.find_spec(name) for name in ("opentelemetry", "opentelemetry.sdk"))


def set_up() -> None:
    """Send spans by OTLP where the environment names an endpoint and the exporter is installed.

    A provider that the application has set is left as it is.
    """
    if not _AVAILABLE or "OTEL_EXPORTER_OTLP_ENDPOINT" not in os.environ:
        return
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    if isinstance(trace.get_tracer_provider(), TracerProvider):
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError:
        log.warning("no spans are sent: install opentelemetry-exporter-otlp-proto-http")
        return
    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)


@contextmanager
def span(name: str, headers: Mapping[str, str], attributes: Mapping[str, Any]) -> Iterator[Any]:
    """A server span below the caller's, if its headers name one; yields None without OpenTelemetry."""
    if not _AVAILABLE:
        yield None
        return
    from opentelemetry import propagate, trace

    context = propagate.extract(dict(headers))
    with trace.get_tracer("midstream").start_as_current_span(
        name, context=context, kind=trace.SpanKind.SERVER, attributes=dict(attributes)
    ) as current:
        yield current
