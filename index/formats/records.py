"""JSON and JSONL files of records `{"id"?, "title"?, "text", …}`: one document per record, read as a stream.

Knows nothing about other formats. Fields besides id, title and text become metadata where they are strings, finite
numbers or booleans; nulls, lists and objects are left out.

Invariant: one record is in memory at a time, however long the file.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from index.errors import DocumentError
from index.formats.parsed import Parsed, clean, one_line, sections_of
from index.types import Section

_BLOCK_CHARS = 1 << 20
_BLANK = re.compile(r"[ \t\r\n]*")
_SHAPE = 'a record must look like {"id": "optional", "title": "…", "text": "…"}'


@dataclass(frozen=True)
class _Item:
    """One value of the file and the line where it starts, from 1."""

    line: int
    value: object


def read_jsonl(path: Path) -> Iterator[Parsed]:
    """One record per line; blank lines are skipped."""
    yield from _records(path, _lines(path))


def read_json(path: Path) -> Iterator[Parsed]:
    """A list of records, or a single one."""
    yield from _records(path, _values(path))


def _records(path: Path, items: Iterator[_Item]) -> Iterator[Parsed]:
    first_lines: dict[str, int] = {}
    for number, item in enumerate(items, start=1):
        fields = _checked(path, item)
        record = one_line(str(fields.get("id", ""))) or str(number)
        if record in first_lines:
            raise DocumentError(path, f"line {item.line}: id {record!r} was used before, in line {first_lines[record]}")
        first_lines[record] = item.line
        title, text = one_line(str(fields.get("title") or "")), str(fields["text"])
        yield Parsed(title, sections_of([Section("", text)]), _metadata(fields), record)


def _checked(path: Path, item: _Item) -> dict[str, object]:
    def refuse(what: str) -> DocumentError:
        return DocumentError(path, f"line {item.line}: {what}; {_SHAPE}")

    fields = item.value
    if not isinstance(fields, dict):
        raise refuse(f"expected an object, found {type(fields).__name__}")
    text = fields.get("text")
    if not isinstance(text, str) or not text.strip():
        raise refuse("field 'text' is missing, empty or not a string")
    if not isinstance(fields.get("title"), str | None):
        raise refuse("field 'title' is not a string")
    if isinstance(fields.get("id"), bool) or not isinstance(fields.get("id"), str | int | None):
        raise refuse("field 'id' is neither a string nor an integer")
    return fields


def _metadata(fields: dict[str, object]) -> dict[str, str | int | float | bool]:
    metadata: dict[str, str | int | float | bool] = {}
    for name, value in fields.items():
        if name in ("id", "title", "text"):
            continue
        if isinstance(value, str):
            metadata[clean(name)] = clean(value)
        elif isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
            metadata[clean(name)] = value
    return metadata


def _lines(path: Path) -> Iterator[_Item]:
    with path.open("rb") as file:  # bytes: lines end at '\n' only, and a decoding error has a line number
        for number, raw in enumerate(file, start=1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if line:
                    yield _Item(number, json.loads(line))
            except (ValueError, RecursionError) as error:
                raise _malformed(path, number, error) from error


def _values(path: Path) -> Iterator[_Item]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            head = file.read(1)
            while head and not head.strip():
                head = file.read(1)
            if head == "[":
                yield from _array_items(path, file)
            elif head:
                yield _Item(1, json.loads(head + file.read()))
    except (ValueError, RecursionError) as error:
        raise _malformed(path, getattr(error, "lineno", None), error) from error


def _array_items(path: Path, file: TextIO) -> Iterator[_Item]:
    """The items of a JSON array whose '[' has been read. Holds one block (or one item, if longer) of text."""
    decode = json.JSONDecoder().raw_decode
    buffer, start, line, is_first = "", 0, 1, True
    while True:
        try:
            at = _skip_blank(buffer, start)
            if buffer[at] == "]":
                break
            if not is_first:
                if buffer[at] != ",":
                    raise json.JSONDecodeError("',' expected between records", buffer, at)
                at = _skip_blank(buffer, at + 1)
            value, end = decode(buffer, at)
        except (IndexError, json.JSONDecodeError) as error:  # malformed, or merely cut off at the end of the block
            block = file.read(max(_BLOCK_CHARS, len(buffer)))
            if not block:
                fault = error.pos if isinstance(error, json.JSONDecodeError) else len(buffer)
                raise _malformed(path, line + buffer.count("\n", start, fault), error) from error
            buffer, start = buffer[start:] + block, 0
            continue
        line += buffer.count("\n", start, at)
        yield _Item(line, value)
        line += buffer.count("\n", at, end)
        start, is_first = end, False
    if (buffer[at + 1 :] + file.read(_BLOCK_CHARS)).strip():
        raise DocumentError(path, "more text after the end of the JSON array")


def _skip_blank(buffer: str, at: int) -> int:
    match = _BLANK.match(buffer, at)
    assert match is not None  # the pattern matches the empty string
    return match.end()


def _malformed(path: Path, line: int | None, error: Exception) -> DocumentError:
    where = f"line {line}: " if line else ""
    cause = "the file ends inside the array" if isinstance(error, IndexError) else getattr(error, "msg", error)
    return DocumentError(path, f"{where}malformed JSON ({cause}); records before it have been read")
