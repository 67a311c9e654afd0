"""What the requests of all endpoints share: strict models, and fields that are accepted only where they mean nothing.

Rule: no parameter is silently ignored. What is honoured has its type in the models beside this module; what OpenAI
defines but this server lacks is accepted at the value that means "off", because official clients send those, and
refused at any other; everything else is unknown and refused by name.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema, core_schema

MAX_NAME = 256  # characters; names come back in errors and logs
MAX_ENTRIES = 4096  # of any list or object in a body, unless a model says less
MAX_VALUES = 65_536  # in a whole body: what is short in bytes can be long to check


@dataclass(frozen=True, eq=False)  # equal ones would be one to typing's cache of Annotated, and (0,) == (False,)
class Only:
    """What `only` makes: the check, and the same in the OpenAPI document."""

    allowed: tuple[object, ...]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._checked, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        del schema, handler
        return {"enum": [*self.allowed, None], "description": "accepted where it has no effect"}

    def _checked(self, value: object) -> object:
        # True is 1 to Python, but not to JSON
        if value is None or any(value == a and isinstance(value, bool) == isinstance(a, bool) for a in self.allowed):
            return value
        choices = " or ".join([json.dumps(a) for a in self.allowed] + ["null"])
        raise ValueError(f"this server does not support it; leave it out (or send {choices})")


def only(*allowed: object) -> Only:
    """Accepts these values, a truth value and a number told apart: the ones that ask for nothing."""
    return Only(allowed)


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
        _check_sizes(body)
        return body


def _check_sizes(body: object) -> None:
    """Raises ValueError where there are more values than any honest request has."""
    num_values, unseen = 0, [body]
    while unseen:
        value = unseen.pop()
        if isinstance(value, dict | list):
            num_values += len(value)
            if len(value) > MAX_ENTRIES or num_values > MAX_VALUES:
                raise ValueError(
                    f"the body holds a list or object of more than {MAX_ENTRIES} entries, or more than {MAX_VALUES} "
                    "values in all; send less at once"
                )
            unseen.extend(value.values() if isinstance(value, dict) else value)
