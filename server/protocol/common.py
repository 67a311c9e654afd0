"""What the requests of all endpoints share: strict models, and fields that are accepted only where they mean nothing.

Rule: no parameter is silently ignored. What is honoured has its type in the models beside this module; what OpenAI
defines but this server lacks is accepted at the value that means "off", because official clients send those, and
refused at any other; everything else is unknown and refused by name.
"""

from __future__ import annotations

import json

from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator

MAX_NAME = 256  # characters; names come back in errors and logs


def only(*allowed: object) -> AfterValidator:
    """Accepts these values, told apart by type as well (False is not 0): the ones that ask for nothing."""

    def check(value: object) -> object:
        if value is None or any(value == a and type(value) is type(a) for a in allowed):
            return value
        choices = " or ".join([json.dumps(a) for a in allowed] + ["null"])
        raise ValueError(f"this server does not support it; leave it out (or send {choices})")

    return AfterValidator(check)


def joined_text(content: object) -> object:
    """The text of a message: a string, or a list of text parts, which are joined by line breaks."""
    if not isinstance(content, list):
        return content
    for i, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise ValueError(f"part {i} is {kind!r}; only parts {{'type': 'text', 'text': …}} are supported")
    return "\n".join(part["text"] for part in content)


class Strict(BaseModel):
    """Unknown fields, other types than those named, and numbers that are none are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Body(Strict):
    """A whole request body."""

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, body: object) -> object:
        """JSON can spell half a surrogate pair, which is no character and breaks tokenizers and encoders alike."""
        try:
            json.dumps(body if isinstance(body, dict) else None, ensure_ascii=False).encode()
        except RecursionError as error:
            raise ValueError("the body is nested too deeply") from error
        except UnicodeEncodeError as error:
            raise ValueError(f"the body holds half a surrogate pair: {error.object[error.start]!a}") from error
        return body
