"""Traces of requests for OpenTelemetry, where OTEL_EXPORTER_OTLP_ENDPOINT names a collector. It is optional."""

import logging
import os
import time
from collections.abc import Mapping
from typing import Any

from .metrics import STEPS

logger = logging.getLogger(__name__)


def make_tracer():
    """What makes spans and sends them, in the background; None without a collector, or without the packages."""
    if not os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT"):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        packages = "opentelemetry-sdk opentelemetry-exporter-otlp-proto-http"
        logger.warning("OTEL_EXPORTER_OTLP_ENDPOINT is set, and traces need `pip install %s`: %s", packages, error)
        return None
    provider = TracerProvider()  # the name of the service and the like: OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider.get_tracer("deployment.server")


def record(tracer: Any, name: str, headers: Mapping[str, str], status: int, began: float, seconds: list[float]) -> None:
    """A span for a request, part of the trace that its header `traceparent` names, and one for each of its steps.

    Args:
        began: when, by `time.perf_counter`.
        seconds: that each step took.
    """
    from opentelemetry.trace import SpanKind, set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    now = time.time_ns()
    at = now - int(1e9 * (time.perf_counter() - began))
    trace = TraceContextTextMapPropagator().extract(headers)
    request = tracer.start_span(f"predict {name}", trace, SpanKind.SERVER, start_time=at)
    request.set_attribute("http.response.status_code", status)
    for step, taken in zip(STEPS, seconds, strict=True):
        span = tracer.start_span(step, set_span_in_context(request), start_time=at)
        at += int(1e9 * taken)
        span.end(at)
    request.end(now)
