"""OpenTelemetry: one span per finished request, where `opentelemetry-api` is installed.

What becomes of the spans is up to who runs the server, e.g. `opentelemetry-instrument fusionrag serve` with the
exporter that the OTEL_* variables name; without an SDK they cost next to nothing, without the library nothing at all.

A span is written when its request has ended, from the request's record: its name is the route's pattern, its parent
what the client sent as `traceparent`. Its children are the phases, laid end to end from the request's start: their
durations are measured, their starts are not.

Invariant: no text of users, documents or answers becomes part of a span; a collection is the hash of its name.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from server.access_log import QUIET_ROUTES, RequestRecord

if TYPE_CHECKING:
    from opentelemetry.trace import Span, TracerProvider

_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
_CONTEXT_HEADERS = (b"traceparent", b"tracestate")
# the order in which they happen; others follow
_FIRST_PHASES = ("retrieve_ms", "queue_ms")


def tracing() -> Tracing | None:
    """The process's tracing; None where the library is not installed."""
    try:
        return Tracing()
    except ImportError:
        return None


class Tracing:
    """Turns records of finished requests into spans of `provider` (the process's own, if None)."""

    def __init__(self, provider: TracerProvider | None = None) -> None:
        """Raises ImportError."""
        from opentelemetry import propagate, trace

        self._trace, self._propagate = trace, propagate
        self._tracer = trace.get_tracer("fusionrag", tracer_provider=provider)

    def observe(self, record: RequestRecord, scope: Any) -> None:
        """Writes the spans of one request that ends now. scope: its ASGI scope."""
        if record.route in QUIET_ROUTES:
            return
        end_ns = time.time_ns()
        begin_ns = end_ns - int(record.elapsed_ms() * 1e6)
        carrier = {
            name.decode(): value.decode("latin-1") for name, value in scope["headers"] if name in _CONTEXT_HEADERS
        }
        span = self._tracer.start_span(
            record.route,
            context=self._propagate.extract(carrier),
            kind=self._trace.SpanKind.SERVER,
            start_time=begin_ns,
            attributes=dict(_attributes(record, scope["method"])),
        )
        if span.is_recording():
            self._describe(span, record, begin_ns)
        span.end(end_ns)

    def _describe(self, span: Span, record: RequestRecord, begin_ns: int) -> None:
        if record.status == 0 or record.status >= 500:
            span.set_status(self._trace.StatusCode.ERROR)
        if record.ttft_server_ms is not None:
            span.add_event("first_token", timestamp=begin_ns + int(record.ttft_server_ms * 1e6))
        inside = self._trace.set_span_in_context(span)
        for name, ms in _phases(record):
            child = self._tracer.start_span(name, context=inside, start_time=begin_ns)
            begin_ns += int(ms * 1e6)
            child.end(begin_ns)


def _attributes(record: RequestRecord, method: str) -> Iterator[tuple[str, str | int | float]]:
    yield "http.request.method", method if method in _METHODS else "_OTHER"
    yield "http.route", record.route
    yield "http.response.status_code", record.status
    yield "fusionrag.request_id", record.request_id
    if record.collection is not None:
        yield "fusionrag.collection_hash", hashlib.sha256(record.collection.encode()).hexdigest()[:16]
    if record.generates:
        yield "fusionrag.finish_reason", record.outcome
    if record.ttft_server_ms is not None:
        yield "fusionrag.ttft_ms", record.ttft_server_ms
    if (stats := record.stats) is not None:
        yield "gen_ai.usage.input_tokens", stats.prompt_tokens
        yield "gen_ai.usage.output_tokens", stats.completion_tokens
        yield "fusionrag.way", stats.way
        yield "fusionrag.reused_tokens", stats.reused_tokens
        yield "fusionrag.recomputed_tokens", stats.recomputed_tokens
        yield "fusionrag.computed_tokens", stats.computed_tokens


def _phases(record: RequestRecord) -> list[tuple[str, float]]:
    """Name and milliseconds of each phase that took any time, in order."""
    if record.stats is None:
        return []
    found = asdict(record.stats.phases)
    ordered = [*_FIRST_PHASES, *(name for name in found if name not in _FIRST_PHASES)]
    return [(name.removesuffix("_ms"), found[name]) for name in ordered if found[name]]
