"""What POST /v1/files takes besides the file itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from pydantic import ConfigDict, Field

from server.protocol.common import Body, Strict

MAX_ID = 64  # characters
Purpose = Literal["assistants", "user_data"]
PURPOSES = get_args(Purpose)


class FileExpiry(Strict):
    model_config = ConfigDict(strict=False)  # in a form every value is text

    anchor: Literal["created_at"]
    seconds: int = Field(ge=3600, le=2_592_000)


class UploadRequest(Body):
    """The form's other fields. `expires_after` is sent as `expires_after[anchor]` and `expires_after[seconds]`."""

    purpose: Purpose
    expires_after: FileExpiry | None = None

    @classmethod
    def from_form(cls, fields: Mapping[str, str]) -> UploadRequest:
        """Raises pydantic's ValidationError."""
        values: dict[str, Any] = {}
        for name, value in fields.items():
            outer, _, inner = name.partition("[")
            if inner.endswith("]"):
                values.setdefault(outer, {})[inner[:-1]] = value
            else:
                values[name] = value
        return cls.model_validate(values)


UPLOAD_SCHEMA: dict[str, Any] = {  # FastAPI cannot derive it: the form is read as a stream
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary", "minLength": 1},
                        "purpose": {"type": "string", "enum": list(PURPOSES)},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": 2_592_000},
                    },
                    "additionalProperties": False,
                }
            }
        },
    }
}
