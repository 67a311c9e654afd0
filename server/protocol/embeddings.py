"""Requests for embeddings as this server reads them. Knows nothing of HTTP."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from server.protocol.common import MAX_NAME, Body

MAX_INPUTS = 2048


def _texts(value: object) -> object:
    """One text or several; tokens are some other model's."""
    values = [value] if isinstance(value, str) else value
    if isinstance(values, list) and any(isinstance(v, int | list) for v in values):
        raise ValueError("arrays of tokens are not supported; send text")
    return values


class EmbeddingRequest(Body):
    """POST /v1/embeddings."""

    model: str = Field(max_length=MAX_NAME)
    input: Annotated[
        list[Annotated[str, Field(min_length=1)]],
        BeforeValidator(_texts, json_schema_input_type=str | list[str]),
    ] = Field(min_length=1, max_length=MAX_INPUTS)
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(default=None, ge=1, description="the model's own number, or nothing")
    user: str | None = None  # whom the client serves; kept out of logs
