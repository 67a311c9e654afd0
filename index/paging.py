"""Ids in the order of their making, and pages of lists that are read in that order.

Knows nothing about what is listed.

Invariant: a cursor is a place, not a row: the rows after it are the same whether the row it names is still there or
not, so that a client may delete what it lists while it goes on listing.
"""

from __future__ import annotations

import secrets
import sqlite3
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from index.errors import InvalidValue

T = TypeVar("T")
_TIME_DIGITS, _RANDOM_BITS = 13, 44  # 24 hex digits together; the time is in microseconds
Place = tuple[str | int, ...]


@dataclass(frozen=True)
class PageRequest:
    """Which part of a list is wanted: at most `limit` items right after, or right before, the item with an id."""

    limit: int = 20
    order: Literal["asc", "desc"] = "desc"  # by the time of making
    after: str | None = None
    before: str | None = None


@dataclass(frozen=True)
class Page(Generic[T]):
    """Items in the order asked for. `has_more`: the list goes on in the direction of reading."""

    items: tuple[T, ...]
    has_more: bool


def new_id(prefix: str) -> str:
    """`prefix` and 24 hex digits. Ids made one after the other sort in that order, down to the microsecond."""
    return f"{prefix}{time.time_ns() // 1000:0{_TIME_DIGITS}x}{secrets.randbits(_RANDOM_BITS):011x}"


def made_at(id: str) -> int:
    """The Unix time in seconds that is written in an id of `new_id`."""
    return int(id[-24:][:_TIME_DIGITS], 16) // 1_000_000


def read_page(
    connection: sqlite3.Connection,
    select: str,
    values: Sequence[object],
    columns: tuple[str, ...],
    request: PageRequest,
    place: Callable[[str], Place],
) -> tuple[list[Any], bool]:
    """The rows of one page, and whether there are more.

    select: a statement that ends in its WHERE clause, with `values`; columns: what the list is ordered by, unique
    together; place: the values of `columns` for an id, or InvalidValue.
    """
    backwards = request.before is not None and request.after is None
    rising = (request.order == "asc") != backwards
    asked = list(values)
    for name, cursor, is_after in (("after", request.after, True), ("before", request.before, False)):
        if cursor is not None:
            comparison = ">" if is_after == (request.order == "asc") else "<"
            select += f" AND ({', '.join(columns)}) {comparison} ({', '.join('?' * len(columns))})"
            asked += _place_named(name, cursor, place)
    order = ", ".join(f"{column} {'ASC' if rising else 'DESC'}" for column in columns)
    rows = connection.execute(f"{select} ORDER BY {order} LIMIT ?", (*asked, request.limit + 1)).fetchall()
    page = rows[: request.limit]
    return page[::-1] if backwards else page, len(rows) > request.limit


def _place_named(name: str, cursor: str, place: Callable[[str], Place]) -> Place:
    try:
        return place(cursor)
    except ValueError as error:
        raise InvalidValue(name, f"must be an id from the list, got {cursor[:64]!r}") from error
