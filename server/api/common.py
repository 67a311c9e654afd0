"""What the routes share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from fastapi import Response
from pydantic import BaseModel

from fusionrag.types import RequestStats
from server.errors import ErrorBody

ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}

# what a route that can also stream adds
STREAMED: dict[int | str, dict[str, Any]] = {
    **ERRORS,
    200: {"content": {"text/event-stream": {}}},
}


def json_response(reply: BaseModel, headers: Mapping[str, str] | None = None) -> Response:
    return Response(reply.model_dump_json(), headers=headers, media_type="application/json")


def timing_headers(stats: RequestStats | None) -> dict[str, str]:
    """The phases of an answer, for browsers and proxies; nothing before its first token."""
    if stats is None:
        return {}
    phases = (f"{name.removesuffix('_ms')};dur={ms:.3f}" for name, ms in asdict(stats.phases).items())
    return {"Server-Timing": ", ".join(phases)}
