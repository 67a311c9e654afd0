"""Answers that are kept for a while, so that a client can read them again or go on from them.

Knows nothing of what is in an answer: it is text here.

Invariant: an answer is found by its id and its owner together, and for `keep_days` days; after that, and for others, it
is as unknown as one that never was.
"""

from __future__ import annotations

import time

from index.catalogue import Catalogue
from index.errors import NotFound

_DAY_S = 86_400
_CLEARING_INTERVAL_S = 3_600


class StoredResponses:
    """The answers in one catalogue. Safe to use from several threads."""

    def __init__(self, catalogue: Catalogue, keep_days: int) -> None:
        self._database, self._keep_s = catalogue.database, keep_days * _DAY_S
        self._next_clearing = 0.0

    def add(self, response_id: str, owner: str, body: str) -> None:
        """Keeps an answer, and clears away those whose time is over, at most once an hour."""
        now = time.time()
        with self._database.write() as connection:
            connection.execute("INSERT INTO responses VALUES (?, ?, ?, ?)", (response_id, owner, int(now), body))
            if now >= self._next_clearing:
                connection.execute("DELETE FROM responses WHERE created_at < ?", (int(now) - self._keep_s,))
                self._next_clearing = now + _CLEARING_INTERVAL_S

    def body(self, response_id: str, owner: str) -> str:
        """What was kept. Raises NotFound."""
        with self._database.read() as connection:
            row = connection.execute(
                "SELECT body FROM responses WHERE id = ? AND owner = ? AND created_at >= ?",
                (response_id, owner, int(time.time()) - self._keep_s),
            ).fetchone()
        if row is None:
            raise NotFound("response", response_id)
        return str(row[0])

    def delete(self, response_id: str, owner: str) -> None:
        """Forgets an answer. Raises NotFound."""
        with self._database.write() as connection:
            done = connection.execute("DELETE FROM responses WHERE id = ? AND owner = ?", (response_id, owner))
        if done.rowcount == 0:
            raise NotFound("response", response_id)
