"""Whom a request comes from: the operator's key and the stored ones, followed while the server runs.

Knows nothing of routes. The stored keys are read again when the last reading is older than FOLLOW_S, by the request
that finds it so; the others wait for it, so that no key opens anything longer than that after it was taken away.

Invariant: a key is compared with all keys, in constant time, whichever fits. Once a key was needed it stays so until
the server ends, even when the last one is removed: a mistake at the command line must not open the server.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from typing import Protocol

from index.api_keys import ApiKey, key_hash
from index.errors import CatalogueError

logger = logging.getLogger(__name__)
FOLLOW_S = 1.0
_SCHEME = b"bearer "


class StoredKeys(Protocol):
    """Where named keys are kept: `index.api_keys.ApiKeys`."""

    def all(self) -> tuple[ApiKey, ...]: ...


class KeyRing:
    """All keys that open this server. Belongs to the event loop. `operator_key` is that of the owner ''; '' is none."""

    def __init__(self, operator_key: str = "", stored: StoredKeys | None = None, follow_s: float = FOLLOW_S) -> None:
        """Reads the stored keys. Raises CatalogueError."""
        self._operator = ((key_hash(operator_key.encode()), ""),) if operator_key else ()
        self._stored, self._follow_s = stored, follow_s
        self._reading = asyncio.Lock()
        self._is_locked = bool(self._operator)
        self._take(stored.all() if stored else ())

    @property
    def is_locked(self) -> bool:
        """Whether a key is needed."""
        return self._is_locked

    async def follow(self) -> None:
        """Reads the stored keys again, if it is time. Where that fails the known ones go on to hold."""
        if self._is_fresh():
            return
        async with self._reading:
            if self._is_fresh() or self._stored is None:
                return
            try:
                self._take(await asyncio.to_thread(self._stored.all))
            except CatalogueError as error:
                self._read_at = time.monotonic()
                logger.warning("the API keys could not be read again (%s); those known before go on to hold", error)

    def owner(self, authorization: bytes) -> str | None:
        """The owner that the header's key stands for; None where it is no key of ours."""
        if authorization[: len(_SCHEME)].lower() != _SCHEME:
            return None
        given, owner = key_hash(authorization[len(_SCHEME) :].strip(b" \t")), None
        for known, name in self._entries:  # to the end: how long it takes must not tell which one fits
            if hmac.compare_digest(given, known):
                owner = name
        return owner

    def _is_fresh(self) -> bool:
        return self._stored is None or time.monotonic() - self._read_at < self._follow_s

    def _take(self, keys: tuple[ApiKey, ...]) -> None:
        self._read_at = time.monotonic()
        self._entries = (*self._operator, *((key.key_hash, key.name) for key in keys))
        if self._is_locked and not self._entries:
            logger.warning("no API key is left: every request is refused until one is added or the server starts anew")
        self._is_locked = self._is_locked or bool(self._entries)
