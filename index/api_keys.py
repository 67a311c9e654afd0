"""The API keys: who may ask, and under which name what is made belongs to them.

Knows nothing of HTTP, nor of what a key opens.

Invariant: a key itself is nowhere on disk; only its SHA-256 is, which suffices because a key is 32 random bytes.
"""

from __future__ import annotations

import base64
import hashlib
import re
import secrets
import sqlite3
from dataclasses import dataclass

from index.catalogue import Catalogue
from index.errors import Conflict, InvalidValue, NotFound

PREFIX = "frk_"
_NUM_RANDOM_BYTES = 32
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


def key_hash(key: bytes) -> bytes:
    """What is stored of a key: its SHA-256, 32 bytes."""
    return hashlib.sha256(key).digest()


@dataclass(frozen=True)
class ApiKey:
    """One key, without the key. `name` is also the owner of what is made with it; `created_at` is Unix time."""

    name: str
    key_hash: bytes
    created_at: int


class ApiKeys:
    """The keys of one data directory. Safe to use from several threads and processes."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._database = catalogue.database

    def add(self, name: str) -> str:
        """Makes a key and returns it; it cannot be had again. What an earlier key of this name owned is its own.

        Raises InvalidValue for a name other than 1 to 64 of A-Z a-z 0-9 _ . -, and Conflict where the name has a key.
        """
        if not _NAME.fullmatch(name):
            raise InvalidValue("name", f"must be 1 to 64 of the characters A-Z a-z 0-9 _ . -, got {name!r}")
        key = PREFIX + base64.urlsafe_b64encode(secrets.token_bytes(_NUM_RANDOM_BYTES)).decode().rstrip("=")
        with self._database.write() as connection:
            try:
                connection.execute(
                    "INSERT INTO api_keys VALUES (?, ?, CAST(strftime('%s', 'now') AS INTEGER))",
                    (name, key_hash(key.encode())),
                )
            except sqlite3.IntegrityError as error:
                raise Conflict(f"the name {name!r} has a key already; remove that one first to replace it") from error
        return key

    def remove(self, name: str) -> None:
        """Takes the key away; what is owned under its name stays, for a later key of this name. Raises NotFound."""
        with self._database.write() as connection:
            if connection.execute("DELETE FROM api_keys WHERE name = ?", (name,)).rowcount == 0:
                raise NotFound("API key", name)

    def all(self) -> tuple[ApiKey, ...]:
        """All keys, by name."""
        with self._database.read() as connection:
            rows = connection.execute("SELECT name, key_hash, created_at FROM api_keys ORDER BY name").fetchall()
        return tuple(ApiKey(*row) for row in rows)
