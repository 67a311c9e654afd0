"""Prometheus metrics of one server, in a registry of its own. Fed with finished requests; knows nothing of HTTP."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from fusionrag.engine import EngineLoad
from server.access_log import RequestRecord
from server.ingestion import Ingestion
from server.loop_lag import LoopLag

CONTENT_TYPE = CONTENT_TYPE_LATEST
# vLLM's, so that dashboards compare like with like
TTFT_BUCKETS_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)


class Metrics:
    """`load` is asked whenever the metrics are read."""

    def __init__(self, load: Callable[[], EngineLoad]) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._ttft = Histogram(
            "fusionrag_time_to_first_token_seconds",
            "From a request's arrival to its first content's departure",
            buckets=TTFT_BUCKETS_S,
            registry=registry,
        )
        self._phases = Histogram(
            "fusionrag_phase_seconds",
            "Parts of the time to first token",
            ["phase"],
            buckets=TTFT_BUCKETS_S,
            registry=registry,
        )
        self._tokens = Counter("fusionrag_tokens", "Tokens by how their KV came about", ["kind"], registry=registry)
        self._chunks = Counter("fusionrag_chunks", "Chunks by where their KV came from", ["source"], registry=registry)
        self._ways = Counter(
            "fusionrag_requests_by_way",
            "Answers by how they got to their first token: reuse, prefix or full",
            ["way"],
            registry=registry,
        )
        self._requests = Counter(
            "fusionrag_requests", "Completion requests by how they ended", ["finish_reason"], registry=registry
        )
        self._http_requests = Counter(
            "fusionrag_http_requests", "All requests by route and status", ["route", "status"], registry=registry
        )
        for name, help_text, read in (
            ("fusionrag_requests_running", "Requests that are being answered", lambda: load().num_running),
            ("fusionrag_requests_waiting", "Requests in the engine's queue", lambda: load().num_waiting),
            ("fusionrag_arena_tokens", "Slots of the KV arena", lambda: load().arena_tokens),
            ("fusionrag_arena_used_tokens", "Slots of the KV arena in use", lambda: load().arena_used_tokens),
        ):
            Gauge(name, help_text, registry=registry).set_function(read)

    def watch_loop(self, lag: LoopLag) -> None:
        help_text = "Longest time that the event loop was blocked since the metrics were last read"
        Gauge("fusionrag_event_loop_lag_seconds", help_text, registry=self._registry).set_function(lag.take)

    def watch_ingestion(self, ingestion: Ingestion) -> None:
        ended = Gauge(
            "fusionrag_ingested_files", "Attached files by how their ingest ended", ["outcome"], registry=self._registry
        )
        for outcome in ingestion.outcomes:
            ended.labels(outcome).set_function(partial(_outcome, ingestion, outcome))
        for name, help_text, read in (
            ("fusionrag_ingest_busy", "1 while attached files are ingested", lambda: float(ingestion.is_busy)),
            ("fusionrag_ingest_restarts", "Times the ingest process died", lambda: float(ingestion.num_restarts)),
        ):
            Gauge(name, help_text, registry=self._registry).set_function(read)

    def observe(self, record: RequestRecord) -> None:
        """Counts one finished request; all but the first counter are of the routes that answer questions."""
        self._http_requests.labels(record.route, record.status).inc()
        if not record.generates:
            return
        self._requests.labels(record.outcome).inc()
        if record.ttft_server_ms is not None:
            self._ttft.observe(record.ttft_server_ms / 1e3)
        if (stats := record.stats) is None:
            return
        self._ways.labels(stats.way).inc()
        for name, ms in asdict(stats.phases).items():
            self._phases.labels(name.removesuffix("_ms")).observe(ms / 1e3)
        for kind, num_tokens in (
            ("reused", stats.reused_tokens),
            ("recomputed", stats.recomputed_tokens),
            ("computed", stats.computed_tokens),
            ("generated", stats.completion_tokens),
        ):
            self._tokens.labels(kind).inc(num_tokens)
        for chunk in stats.chunks:
            self._chunks.labels(chunk.source.value).inc()

    def exposition(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)


def _outcome(ingestion: Ingestion, outcome: str) -> int:
    return ingestion.outcomes[outcome]
