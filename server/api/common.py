"""What the routes share."""

from __future__ import annotations

from typing import Any

from fastapi import Response
from pydantic import BaseModel

from server.errors import ErrorBody

ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}


def json_response(reply: BaseModel) -> Response:
    return Response(reply.model_dump_json(), media_type="application/json")
