"""JSON and JSONL files as records whose errors name the file, the record and the field at fault.

Knows nothing about what the fields mean. Invariant: every value handed out has the type its method says.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.evaluation.errors import DatasetError


@dataclass(frozen=True)
class JsonRecord:
    """A JSON object of a file, and where it stands. Every method raises DatasetError if the field is not as it says."""

    path: Path
    number: int  # 1-based: place in the array, or line of a JSONL file
    fields: dict[str, Any]
    prefix: str = ""  # from the record to this object, such as 'ctxs[3].'

    def error(self, field: str, problem: str) -> DatasetError:
        return DatasetError(f"{self.path}: record {self.number}: field '{self.prefix}{field}': {problem}")

    def string(self, field: str) -> str:
        """A string that is not blank, stripped."""
        value = self._require(field, str, "a string")
        if not value.strip():
            raise self.error(field, "must not be empty")
        return str(value.strip())

    def optional_string(self, *names: str) -> str:
        """The first of `names` that is present, as text (ids may be numbers); '' if none is."""
        return next((str(self.fields[name]).strip() for name in names if self.fields.get(name) is not None), "")

    def items(self, field: str) -> list[Any]:
        """A list with at least one item."""
        value: list[Any] = self._require(field, list, "a list")
        if not value:
            raise self.error(field, "must not be empty")
        return value

    def objects(self, field: str) -> list[JsonRecord]:
        """A list of objects, at least one."""
        found = []
        for i, item in enumerate(self.items(field)):
            if not isinstance(item, dict):
                raise self.error(f"{field}[{i}]", f"must be an object, got {_kind(item)}")
            found.append(JsonRecord(self.path, self.number, item, f"{self.prefix}{field}[{i}]."))
        return found

    def strings(self, field: str) -> tuple[str, ...]:
        """The strings of a string or a list of any depth, stripped, each once, blank ones dropped, at least one."""
        found = tuple(dict.fromkeys(self._strings(field, self.fields.get(field))))
        if not found:
            raise self.error(field, "must hold at least one string that is not empty")
        return found

    def _strings(self, field: str, value: object) -> Iterator[str]:
        if isinstance(value, list):
            for i, item in enumerate(value):
                yield from self._strings(f"{field}[{i}]", item)
        elif not isinstance(value, str):
            raise self.error(field, f"must be a string or a list of strings, got {_kind(value)}")
        elif value.strip():
            yield value.strip()

    def _require(self, field: str, kind: type, name: str) -> Any:
        value = self.fields.get(field)
        if not isinstance(value, kind):
            problem = f"must be {name}, got {_kind(value)}" if field in self.fields else f"is missing; must be {name}"
            raise self.error(field, problem)
        return value


def read_json_records(path: Path) -> list[JsonRecord]:
    """The objects of a JSON array or a JSONL file; a file that is one JSON object is one record."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DatasetError(
            f"{path}: cannot be read: {error.strerror}; give the path of a JSON or JSONL file"
        ) from error
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path}: is not UTF-8 text (byte {error.start}); give a JSON or JSONL file") from error
    if not text.strip():
        raise DatasetError(f"{path}: is empty; give a JSON or JSONL file")
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        numbered = _read_lines(path, text, error)
    else:
        numbered = list(enumerate(content if isinstance(content, list) else [content], start=1))
    for number, value in numbered:
        if not isinstance(value, dict):
            raise DatasetError(f"{path}: record {number}: must be an object, got {_kind(value)}")
    return [JsonRecord(path, number, value) for number, value in numbered]


def _read_lines(path: Path, text: str, whole: json.JSONDecodeError) -> list[tuple[int, Any]]:
    """JSONL as (line number, value); if not even the first line is JSON, the file was meant as one JSON value."""
    numbered: list[tuple[int, Any]] = []
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: U+2028 may stand inside a string
        if not line.strip():
            continue
        try:
            numbered.append((number, json.loads(line)))
        except json.JSONDecodeError as error:
            if not numbered:
                break
            raise DatasetError(
                f"{path}: record {number}: malformed JSON: {error.msg} at column {error.colno}"
            ) from error
    if not numbered:
        at = f"line {whole.lineno}, column {whole.colno}"
        raise DatasetError(f"{path}: malformed JSON: {whole.msg} at {at}") from whole
    return numbered


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
