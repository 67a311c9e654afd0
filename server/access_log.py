"""What is known of one request, and the one line that is logged about it.

The line is JSON on the logger `fusionrag.request`. It never holds what users ask or get: no question, no passage, no
answer, no path beyond the route's own pattern.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from dataclasses import asdict, dataclass, field

from fusionrag.types import RequestStats

logger = logging.getLogger("fusionrag.request")
COMPLETION_ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
QUIET_ROUTES = ("/health", "/ready", "/metrics")  # polled by machines: logged at DEBUG


@dataclass
class RequestRecord:
    """Filled in by whoever handles the request, in its one task; read when it has ended."""

    request_id: str
    started: float = field(default_factory=time.perf_counter)
    route: str = "unknown"
    status: int = 0  # 0: no reply was begun
    collection: str | None = None
    finish_reason: str | None = None
    stats: RequestStats | None = None
    ttft_server_ms: float | None = None

    @property
    def generates(self) -> bool:
        return self.route in COMPLETION_ROUTES

    @property
    def outcome(self) -> str:
        """How it ended: the engine's finish_reason, or 'rejected' when it never got there."""
        if self.finish_reason is not None:
            return self.finish_reason
        if self.status == 499:
            return "cancelled"
        return "rejected" if 400 <= self.status < 500 else "error"

    def elapsed_ms(self) -> float:
        return (time.perf_counter() - self.started) * 1e3

    def mark_first_content(self) -> None:
        """The first non-empty content has been handed to the transport (unstreamed: is ready)."""
        if self.ttft_server_ms is None:
            self.ttft_server_ms = self.elapsed_ms()


def line(record: RequestRecord) -> str:
    """The record as one JSON object; times in milliseconds."""
    fields: dict[str, object] = {
        "request_id": record.request_id,
        "route": record.route,
        "status": record.status,
        "collection": record.collection,
        "finish_reason": record.outcome if record.generates else None,
        "total_ms": round(record.elapsed_ms(), 3),
        "ttft_server_ms": _rounded(record.ttft_server_ms),
    }
    if (stats := record.stats) is not None:
        fields |= {
            "ttft_ms": round(stats.ttft_ms, 3),
            "way": stats.way,
            "predicted_ms": _rounded(stats.predicted_ms),
            "predicted_full_ms": _rounded(stats.predicted_full_ms),
            "phases_ms": {name.removesuffix("_ms"): round(ms, 3) for name, ms in asdict(stats.phases).items()},
            "kv_arrival_ms": round(stats.arrival_ms, 3),
            "prompt_tokens": stats.prompt_tokens,
            "completion_tokens": stats.completion_tokens,
            "reused_tokens": stats.reused_tokens,
            "recomputed_tokens": stats.recomputed_tokens,
            "computed_tokens": stats.computed_tokens,
        }
    return json.dumps(fields)


def _rounded(ms: float | None) -> float | None:
    return None if ms is None else round(ms, 3)


def write(record: RequestRecord) -> None:
    logger.log(logging.DEBUG if record.route in QUIET_ROUTES else logging.INFO, "%s", line(record))


def to_standard_error() -> None:
    """Sends the lines, bare, to standard error; done by `serve`, never on import."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
