"""From exceptions to OpenAI's error replies: `{"error": {"message", "type", "param", "code"}}`.

The branch of the exception tree that belongs to HTTP (the tree itself: fusionrag/errors.py):

    FusionRAGError
    └── ServerError
        ├── ModelUnknown     the request names a model that is not served
        ├── Draining         the server is stopping and takes no new requests
        ├── EngineDown       the engine raised and is not stepped any more
        ├── RequestTimeout   the answer was not finished in time and was given up
        └── ClientGone       nobody is left to read the answer

Invariant: a reply with status 500 never quotes its exception, so no path, prompt or stack trace leaves the process;
the log has it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from fusionrag.errors import PromptTooLong, QueueFull, RequestError
from index.errors import CollectionNotFound, Conflict, FusionRAGError, InvalidValue, NotFound, StorageFull

logger = logging.getLogger(__name__)


class ServerError(FusionRAGError):
    """The HTTP layer cannot go on with a request."""


class ModelUnknown(ServerError):
    """The request names a model that is not served."""

    field = "model"


class Draining(ServerError):
    """The server is stopping and takes no new requests."""


class EngineDown(ServerError):
    """The engine raised and is not stepped any more."""


class RequestTimeout(ServerError):
    """The answer was not finished in time and was given up."""


class ClientGone(ServerError):
    """Nobody is left to read the answer."""


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """What every reply with a status of 400 or above carries."""

    error: ErrorDetail


@dataclass(frozen=True)
class ErrorReply:
    """One error as it goes over the wire; inside a stream only the body does."""

    status: int
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def body(self) -> ErrorBody:
        detail = ErrorDetail(message=self.message, type=self.type, param=self.param, code=self.code)
        return ErrorBody(error=detail)

    def response(self) -> Response:
        content = self.body.model_dump_json(ensure_ascii=True)
        return Response(content, self.status, dict(self.headers), media_type="application/json")


@dataclass(frozen=True)
class _Kind:
    error: type[Exception]
    status: int
    type: str
    code: str | None
    headers: Mapping[str, str] = field(default_factory=dict)


_KINDS = (  # the first that fits
    _Kind(PromptTooLong, 400, "invalid_request_error", "context_length_exceeded"),
    _Kind(QueueFull, 429, "rate_limit_error", "queue_full", {"Retry-After": "1"}),
    _Kind(RequestError, 400, "invalid_request_error", None),
    _Kind(CollectionNotFound, 404, "invalid_request_error", "collection_not_found"),
    _Kind(NotFound, 404, "invalid_request_error", None),
    _Kind(Conflict, 409, "invalid_request_error", "conflict"),
    _Kind(InvalidValue, 400, "invalid_request_error", None),
    _Kind(StorageFull, 507, "server_error", "storage_full"),
    _Kind(ModelUnknown, 404, "invalid_request_error", "model_not_found"),
    _Kind(ClientGone, 499, "invalid_request_error", "client_gone"),  # logged only: there is nobody to send it to
    _Kind(Draining, 503, "server_error", "draining", {"Retry-After": "5"}),
    _Kind(EngineDown, 503, "server_error", "engine_down"),
    # official clients would send the same long request again
    _Kind(RequestTimeout, 504, "server_error", "timeout", {"x-should-retry": "false"}),
)
_DEFAULT_PARAM: dict[type[Exception], str] = {PromptTooLong: "messages", CollectionNotFound: "collection"}


def reply_for(error: Exception, request_id: str) -> ErrorReply:
    """The reply that tells a client about `error`; anything unforeseen is a 500, and its cause is logged."""
    if isinstance(error, RequestValidationError):
        return _invalid(error.errors())
    if isinstance(error, HTTPException):
        error_type = "invalid_request_error" if error.status_code < 500 else "server_error"
        return ErrorReply(error.status_code, str(error.detail), error_type, headers=error.headers or {})
    for kind in _KINDS:
        if isinstance(error, kind.error):
            param = getattr(error, "field", None) or _DEFAULT_PARAM.get(kind.error)
            return ErrorReply(kind.status, str(error), kind.type, param, kind.code, kind.headers)
    logger.error("request %s failed", request_id, exc_info=error)
    message = f"the server could not answer ({type(error).__name__}); its log has the details under the id {request_id}"
    return ErrorReply(500, message, "server_error")


def _invalid(problems: Sequence[Any]) -> ErrorReply:
    """The first of pydantic's complaints, in words that name the parameter."""
    first = problems[0]
    path = [str(part) for part in first["loc"][1:]]  # in front: body, query or path
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        return ErrorReply(400, f"the body is not valid JSON: {first['ctx']['error']} at character {path[0]}")
    if first["type"] == "value_error" and not path:
        return ErrorReply(400, message)
    if not path:
        return ErrorReply(400, "the body must be a JSON object, sent with 'Content-Type: application/json'")
    param = ".".join(path)
    if first["type"] == "extra_forbidden":
        return ErrorReply(
            400, f"unknown parameter {param!r}: it would have no effect", param=param, code="unknown_parameter"
        )
    return ErrorReply(400, f"{param}: {message}", param=param)
