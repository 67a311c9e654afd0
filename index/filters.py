"""Conditions on a document's metadata: which documents a search may find.

The form is that of OpenAI's vector stores: a comparison of one key, or several conditions joined by `and` or `or`.
`parse_filter` reads that form; `where` turns it into SQL over a column that holds a JSON object.

Invariant: a key that a document lacks, or has with a value of another type (text, number, truth value), fits no
comparison but `ne` and `nin`. Keys and values of a filter never become part of the SQL text.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from index.errors import InvalidValue

Scalar: TypeAlias = str | float | bool  # int is a float here
ComparisonOperator = Literal["eq", "ne", "gt", "gte", "lt", "lte", "in", "nin"]

MAX_DEPTH = 8
MAX_CONDITIONS = 64
MAX_VALUES = 256  # of one `in` or `nin`
MAX_CHARS = 1024  # of a key or a text value

_ORDER = {"gt": ">", "gte": ">=", "lt": "<", "lte": "<="}
_NEGATED = {"ne", "nin"}


@dataclass(frozen=True)
class Comparison:
    """`key` compared with `value`; a tuple of values for `in` and `nin`, one value otherwise."""

    key: str
    operator: ComparisonOperator
    value: Scalar | tuple[Scalar, ...]


@dataclass(frozen=True)
class Compound:
    """All (`and`) or any (`or`) of the conditions."""

    operator: Literal["and", "or"]
    filters: tuple[Filter, ...]


Filter: TypeAlias = Comparison | Compound


def parse_filter(value: object, field: str = "filters") -> Filter:
    """A filter from OpenAI's JSON form: {type, key, value}, or {type: "and" | "or", filters: […]}.

    Raises InvalidValue that names the place at fault, such as 'filters.filters[1].value'.
    """
    return _Parser().parse(value, field, MAX_DEPTH)


def where(condition: Filter, column: str) -> tuple[str, list[str]]:
    """SQL that is true for the rows whose `column` (a name in the query) fits the condition, and its parameters."""
    if isinstance(condition, Compound):
        parts = [where(each, column) for each in condition.filters]
        joined = f" {condition.operator.upper()} ".join(sql for sql, _ in parts)
        return f"({joined})", [parameter for _, parameters in parts for parameter in parameters]
    values = condition.value if isinstance(condition.value, tuple) else (condition.value,)
    operator = _ORDER.get(condition.operator, "=")
    # Both sides are read from JSON, so that equal numbers stay equal whatever digits the parser keeps. `json_each`
    # compares keys as text, where a JSON path would need quoting.
    sql = (
        f"EXISTS (SELECT 1 FROM json_each({column}) AS had, json_each(?) AS wanted WHERE had.key = ? "
        f"AND {_kind('had')} = {_kind('wanted')} AND had.value {operator} wanted.value)"
    )
    negation = "NOT " if condition.operator in _NEGATED else ""
    return negation + sql, [json.dumps(values), condition.key]


def _kind(side: str) -> str:
    return f"replace(replace(replace({side}.type, 'integer', 'real'), 'true', 'bool'), 'false', 'bool')"


class _Parser:
    """One filter being read; counts its comparisons."""

    def __init__(self) -> None:
        self._num_conditions = 0

    def parse(self, value: object, field: str, depth: int) -> Filter:
        if not isinstance(value, Mapping):
            raise InvalidValue(
                field, f"must be an object {{type, key, value}} or {{type, filters}}, got {_name(value)}"
            )
        kind = value.get("type")
        if kind in ("and", "or"):
            return self._compound(value, field, depth)
        if not isinstance(kind, str) or kind not in get_args(ComparisonOperator):
            known = ", ".join((*get_args(ComparisonOperator), "and", "or"))
            raise InvalidValue(f"{field}.type", f"must be one of {known}, got {kind!r}")
        return self._comparison(value, field)

    def _compound(self, value: Mapping[Any, Any], field: str, depth: int) -> Compound:
        _refuse_unknown(value, field, ("type", "filters"))
        parts = value.get("filters")
        if not isinstance(parts, list) or not parts:
            raise InvalidValue(f"{field}.filters", f"must be a list of at least one filter, got {_name(parts)}")
        if depth <= 1:
            raise InvalidValue(f"{field}.filters", f"filters may be nested {MAX_DEPTH} deep at most")
        found = tuple(self.parse(part, f"{field}.filters[{i}]", depth - 1) for i, part in enumerate(parts))
        return Compound(value["type"], found)

    def _comparison(self, value: Mapping[Any, Any], field: str) -> Comparison:
        self._num_conditions += 1
        if self._num_conditions > MAX_CONDITIONS:
            raise InvalidValue(field, f"a filter may have {MAX_CONDITIONS} comparisons at most")
        _refuse_unknown(value, field, ("type", "key", "value"))
        key, operator, operand = value.get("key"), value["type"], value.get("value")
        if not isinstance(key, str) or not key:
            raise InvalidValue(f"{field}.key", f"must be the name of an attribute, got {_name(key)}")
        _text(key, f"{field}.key")
        if operator not in ("in", "nin"):
            return Comparison(key, operator, _scalar(operand, f"{field}.value", operator in _ORDER))
        if not isinstance(operand, list) or not 1 <= len(operand) <= MAX_VALUES:
            raise InvalidValue(f"{field}.value", f"{operator!r} takes a list of 1 to {MAX_VALUES} values")
        return Comparison(key, operator, tuple(_scalar(v, f"{field}.value[{i}]") for i, v in enumerate(operand)))


def _refuse_unknown(value: Mapping[Any, Any], field: str, known: tuple[str, ...]) -> None:
    unknown = [name for name in value if name not in known]
    if unknown:
        raise InvalidValue(field, f"unknown field {unknown[0]!r}; known are {', '.join(known)}")


def _scalar(value: object, field: str, is_ordered: bool = False) -> Scalar:
    if isinstance(value, bool) and is_ordered:
        raise InvalidValue(field, "truth values have no order; compare text or numbers, or use 'eq'")
    if isinstance(value, str):
        return _text(value, field)
    if isinstance(value, bool) or (isinstance(value, int | float) and abs(value) <= sys.float_info.max):
        return value
    raise InvalidValue(field, f"must be text, a finite number or a truth value, got {_name(value)}")


def _text(value: str, field: str) -> str:
    if len(value) > MAX_CHARS:
        raise InvalidValue(field, f"must have {MAX_CHARS} characters at most, got {len(value)}")
    if "\0" in value or any("\ud800" <= char <= "\udfff" for char in value):  # SQLite would cut it, or refuse it
        raise InvalidValue(field, "must be text without NUL characters and lone surrogates")
    return value


def _name(value: object) -> str:
    names = {dict: "an object", list: "a list", type(None): "nothing", str: "text", bool: "a truth value"}
    return names.get(type(value), "a number")
