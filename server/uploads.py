"""The form of POST /v1/files, taken apart while it arrives: its file goes to the disk, its fields are few and short.

Knows the multipart format; knows nothing about what the fields mean.

Invariant: whatever arrives, no more than `FEED_BYTES` and the fields are held in memory, and no more than
`max_file_bytes` are written.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from fusionrag.errors import RequestError
from server.errors import ClientGone

FEED_BYTES = 256 << 10
MAX_FIELDS, MAX_FIELD_BYTES = 8, 1024
MAX_FORM_BYTES = 64 << 10  # what a form may have besides its file
FILE_FIELD = "file"


@dataclass(frozen=True)
class ReceivedForm:
    """What came with the file's bytes."""

    filename: str
    fields: Mapping[str, str]


@dataclass
class FormParts:
    """Takes a form apart. `write` gets the bytes of the file; `feed` may be called in any thread, one at a time."""

    boundary: bytes
    max_file_bytes: int
    write: Callable[[bytes], object]
    filename: str | None = None
    fields: dict[str, bytes] = field(default_factory=dict)
    is_complete: bool = False
    _name: str = ""  # of the part under way
    _header: bytes = b""
    _value: bytes = b""
    _disposition: bytes = b""
    _num_file_bytes: int = 0

    def __post_init__(self) -> None:
        callbacks: Any = {
            "on_part_begin": self._begin_part,
            "on_header_field": self._add_header,
            "on_header_value": self._add_value,
            "on_header_end": self._end_header,
            "on_headers_finished": self._name_part,
            "on_part_data": self._add_data,
            "on_end": self._end,
        }
        try:
            self._parser = MultipartParser(self.boundary, callbacks)
        except FormParserError as error:
            raise _malformed(error) from error

    def feed(self, data: bytes) -> None:
        """Raises HTTPException for a file that is too long, RequestError for a malformed form, or what `write` does."""
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise _malformed(error) from error

    def received(self) -> ReceivedForm:
        """Raises RequestError where the form has no file or breaks off."""
        if not self.is_complete:
            raise RequestError("the form breaks off before its end")
        if self.filename is None:
            raise RequestError("file: is missing; send it as a part of the form, with a file name", FILE_FIELD)
        fields = {name: value.decode("utf-8", "replace") for name, value in self.fields.items()}
        return ReceivedForm(self.filename, fields)

    def _begin_part(self) -> None:
        self._header = self._value = self._disposition = b""

    def _add_header(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _add_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header = self._value = b""

    def _name_part(self) -> None:
        _, options = parse_options_header(self._disposition.decode("latin-1"))
        self._name = options.get(b"name", b"").decode("utf-8", "replace")[:MAX_FIELD_BYTES]
        filename = options.get(b"filename")
        if (self._name == FILE_FIELD) != (filename is not None):
            is_file = self._name == FILE_FIELD
            reason = "must be sent as a file, with a file name" if is_file else "must not be a file"
            raise RequestError(f"{self._name}: {reason}", self._name or None)
        if self._name in self.fields or (filename is not None and self.filename is not None):
            raise RequestError(f"{self._name}: is there twice", self._name)
        if filename is not None:
            self.filename = filename.decode("utf-8", "replace")
            return
        if len(self.fields) == MAX_FIELDS:
            raise RequestError(f"the form has more than {MAX_FIELDS} fields")
        self.fields[self._name] = b""

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        if self._name != FILE_FIELD:
            self.fields[self._name] += data[start:end]
            if len(self.fields[self._name]) > MAX_FIELD_BYTES:
                raise RequestError(f"{self._name}: has more than {MAX_FIELD_BYTES} bytes", self._name)
            return
        self._num_file_bytes += end - start
        if self._num_file_bytes > self.max_file_bytes:
            raise HTTPException(413, f"the file is longer than {self.max_file_bytes} bytes")
        self.write(data[start:end])

    def _end(self) -> None:
        self.is_complete = True


async def receive_form(
    request: Request,
    max_file_bytes: int,
    write: Callable[[bytes], object],
    run: Callable[[Callable[[bytes], None], bytes], Awaitable[None]],
) -> ReceivedForm:
    """Reads the request's form; parsing and writing happen where `run` runs them. Raises what `FormParts` raises."""
    kind, options = parse_options_header(request.headers.get("content-type"))
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise RequestError("the body must be a form (multipart/form-data) with the fields 'file' and 'purpose'")
    parts = FormParts(boundary, max_file_bytes, write)
    waiting = bytearray()
    try:
        async for data in request.stream():
            waiting += data
            if len(waiting) >= FEED_BYTES:
                await run(parts.feed, bytes(waiting))
                waiting.clear()
    except ClientDisconnect as error:
        raise ClientGone("the client closed the connection") from error
    await run(parts.feed, bytes(waiting))
    return parts.received()


def _malformed(error: Exception) -> RequestError:
    return RequestError(f"the form is malformed: {error}")
