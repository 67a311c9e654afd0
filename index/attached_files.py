"""Files attached to collections, alone or in batches: their states, attributes and texts.

Knows nothing about how files are read; whoever ingests takes the rows that are `in_progress` as a queue.

Invariants: everything is looked up together with its owner; what was read from a file leaves its collection in the
transaction that detaches or cancels it.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from index.catalogue import Catalogue
from index.errors import InvalidValue, NotFound
from index.files import documents_of, place_of_file
from index.formats import READERS
from index.library_types import DAY_S, AttachedFile, Attachment, Attributes, FileBatch, FileCounts, FileStatus
from index.paging import Page, PageRequest, made_at, new_id, read_page

_BATCH_PREFIX = "vsfb_"
_COLUMNS = (
    "a.file_id, c.name, a.status, a.error_code, a.error_message, a.attributes, a.chunk_tokens, "
    "a.chunk_overlap_tokens, a.created_at, (SELECT coalesce(sum(length(CAST(k.text AS BLOB)) + length(k.token_ids) + "
    "length(k.vector)), 0) FROM documents AS d JOIN chunks AS k ON k.document = d.id WHERE d.collection = c.id AND "
    "d.document_id >= a.file_id AND d.document_id < a.file_id || '.')"
)
_SELECT = f"SELECT {_COLUMNS} FROM collection_files AS a JOIN collections AS c ON c.id = a.collection WHERE "


class AttachedFiles:
    """The files in all vector stores. Safe to use from many threads.

    Every method raises NotFound for a vector store, file or batch that `owner` does not have.
    """

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue, self._database = catalogue, catalogue.database

    def attach(self, store: str, owner: str, attachment: Attachment) -> AttachedFile:
        """Puts the file in the queue. One that is attached already is taken up again only if that changes anything.

        Raises InvalidValue for a vector store that has expired.
        """
        with self._database.write() as connection:
            key = key_in_use(connection, store, owner)
            attach_files(connection, key, owner, [attachment])
            return _get(connection, store, owner, attachment.file_id)

    def attach_batch(self, store: str, owner: str, attachments: Sequence[Attachment]) -> FileBatch:
        """As `attach`, for many files at once: all of them or, with an unknown one among them, none."""
        id = new_id(_BATCH_PREFIX)
        with self._database.write() as connection:
            key = key_in_use(connection, store, owner)
            connection.execute(
                "INSERT INTO file_batches (id, collection, created_at) VALUES (?, ?, ?)", (id, key, made_at(id))
            )
            attach_files(connection, key, owner, attachments, id)
            return _batch(connection, store, owner, id)

    def get(self, store: str, owner: str, file_id: str) -> AttachedFile:
        with self._database.read() as connection:
            return _get(connection, store, owner, file_id)

    def page(
        self,
        store: str,
        owner: str,
        request: PageRequest,
        status: FileStatus | None = None,
        batch_id: str | None = None,
    ) -> Page[AttachedFile]:
        """The files of a vector store, or of one batch, by the time of their upload."""
        with self._database.read() as connection:
            where, values = "a.collection = ?", list[object]([_key(connection, store, owner)])
            if batch_id is not None:
                where, values = f"{where} AND a.batch_id = ?", [*values, _batch(connection, store, owner, batch_id).id]
            if status is not None:
                where, values = f"{where} AND a.status = ?", [*values, status]
            rows, has_more = read_page(connection, _SELECT + where, values, ("a.file_id",), request, place_of_file)
        return Page(tuple(map(_attached, rows)), has_more)

    def update(self, store: str, owner: str, file_id: str, attributes: Attributes) -> AttachedFile:
        """Sets the attributes of the file and of the documents read from it.

        A value that the parser found and an old attribute had replaced comes back when the file is read again.
        """
        with self._database.write() as connection:
            key = _key(connection, store, owner)
            old = _get(connection, store, owner, file_id)
            connection.execute(
                "UPDATE collection_files SET attributes = ? WHERE collection = ? AND file_id = ?",
                (json.dumps(dict(attributes)), key, file_id),
            )
            rows = connection.execute(
                "SELECT id, metadata FROM documents WHERE collection = ? AND document_id >= ? AND document_id < ?",
                (key, *documents_of(file_id)),
            ).fetchall()
            for row, metadata in rows:
                found = {k: v for k, v in json.loads(metadata).items() if k not in old.attributes}
                changed = json.dumps({**found, **attributes})
                connection.execute("UPDATE documents SET metadata = ? WHERE id = ?", (changed, row))
            connection.execute("UPDATE collections SET revision = revision + 1 WHERE id = ?", (key,))
            return _get(connection, store, owner, file_id)

    def detach(self, store: str, owner: str, file_id: str) -> None:
        """Takes the file, and all that was read from it, out of the vector store. The file itself stays."""
        with self._database.write() as connection:
            key = _key(connection, store, owner)
            _get(connection, store, owner, file_id)
            connection.execute("DELETE FROM collection_files WHERE collection = ? AND file_id = ?", (key, file_id))
            self._catalogue.remove_documents(connection, key, *documents_of(file_id))

    def texts(self, store: str, owner: str, file_id: str) -> list[str]:
        """The passages that were read from the file, in order."""
        with self._database.read() as connection:
            key = _key(connection, store, owner)
            _get(connection, store, owner, file_id)
            rows = connection.execute(
                "SELECT k.text FROM documents AS d JOIN chunks AS k ON k.document = d.id WHERE d.collection = ? AND "
                "d.document_id >= ? AND d.document_id < ? ORDER BY d.id, k.ordinal",
                (key, *documents_of(file_id)),
            )
            return [row[0] for row in rows]

    def batch(self, store: str, owner: str, batch_id: str) -> FileBatch:
        with self._database.read() as connection:
            return _batch(connection, store, owner, batch_id)

    def cancel_batch(self, store: str, owner: str, batch_id: str) -> FileBatch:
        """Takes those of its files out of the queue that are still in it."""
        with self._database.write() as connection:
            key = _key(connection, store, owner)
            _batch(connection, store, owner, batch_id)
            cancelled = connection.execute(
                "UPDATE collection_files SET status = 'cancelled' WHERE collection = ? AND batch_id = ? AND "
                "status = 'in_progress' RETURNING file_id",
                (key, batch_id),
            ).fetchall()
            for (file_id,) in cancelled:
                self._catalogue.remove_documents(connection, key, *documents_of(file_id))
            return _batch(connection, store, owner, batch_id)


def attach_files(
    connection: sqlite3.Connection, key: int, owner: str, attachments: Sequence[Attachment], batch_id: str | None = None
) -> None:
    """Attaches files within the caller's transaction. Raises NotFound for an unknown file.

    A file of a format that nobody reads fails at once, as the others would later.
    """
    now = int(time.time())
    for item in attachments:
        row = connection.execute(
            "SELECT filename FROM files WHERE id = ? AND owner = ? AND (expires_at IS NULL OR expires_at > ?)",
            (item.file_id, owner, now),
        ).fetchone()
        if row is None:
            raise NotFound("file", item.file_id)
        values = (*_first_state(row[0]), *_merged(connection, key, item))
        connection.execute(
            "INSERT INTO collection_files (collection, file_id, batch_id, created_at, status, error_code, "
            "error_message, attributes, chunk_tokens, chunk_overlap_tokens) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) "
            "ON CONFLICT DO UPDATE SET status = CASE WHEN status = 'completed' AND attributes = excluded.attributes "
            "AND chunk_tokens IS excluded.chunk_tokens AND chunk_overlap_tokens IS excluded.chunk_overlap_tokens "
            "THEN status ELSE excluded.status END, error_code = excluded.error_code, error_message = "
            "excluded.error_message, batch_id = coalesce(excluded.batch_id, batch_id), attributes = "
            "excluded.attributes, chunk_tokens = excluded.chunk_tokens, chunk_overlap_tokens = "
            "excluded.chunk_overlap_tokens",
            (key, item.file_id, batch_id, now, *values),
        )


def key_in_use(connection: sqlite3.Connection, store: str, owner: str) -> int:
    """The row of a vector store that is changed within the caller's transaction, which puts off its end.

    Raises NotFound, and InvalidValue for one that has expired.
    """
    key, now = _key(connection, store, owner), int(time.time())
    updated = connection.execute(
        "UPDATE collections SET last_active_at = ?1 WHERE id = ?2 AND "
        f"(expires_after_days IS NULL OR last_active_at + expires_after_days * {DAY_S} > ?1)",
        (now, key),
    )
    if updated.rowcount == 0:
        raise InvalidValue("vector_store_id", f"{store!r} has expired; make a new one with the same files")
    return key


def file_counts(connection: sqlite3.Connection, where: str, values: Sequence[object]) -> FileCounts:
    """How many rows of `collection_files` are in which state."""
    rows = connection.execute(f"SELECT status, count(*) FROM collection_files WHERE {where} GROUP BY status", values)
    return FileCounts(**dict(rows))


def _first_state(filename: str) -> tuple[str, str | None, str | None]:
    """Status, error code and message of a file that has just been attached."""
    suffix = Path(filename).suffix
    if suffix.lower() in READERS:
        return "in_progress", None, None
    kind = f"the extension {suffix!r}" if suffix else "a name without extension"
    message = f"{filename}: {kind} is not supported; supported are {' '.join(READERS)}"
    return "failed", "unsupported_file", message


def _merged(connection: sqlite3.Connection, key: int, item: Attachment) -> tuple[object, ...]:
    """Attributes (JSON) and chunk sizes: those asked for, else those it was attached with before."""
    row = connection.execute(
        "SELECT attributes, chunk_tokens, chunk_overlap_tokens FROM collection_files "
        "WHERE collection = ? AND file_id = ?",
        (key, item.file_id),
    ).fetchone()
    attributes, chunk_tokens, overlap = row or ("{}", None, None)
    if item.attributes is not None:
        attributes = json.dumps(dict(item.attributes))
    if item.chunk_tokens is not None:
        chunk_tokens, overlap = item.chunk_tokens, item.chunk_overlap_tokens
    return attributes, chunk_tokens, overlap


def _key(connection: sqlite3.Connection, store: str, owner: str) -> int:
    row = connection.execute("SELECT id FROM collections WHERE name = ? AND owner = ?", (store, owner)).fetchone()
    if row is None:
        raise NotFound("vector store", store)
    return int(row[0])


def _get(connection: sqlite3.Connection, store: str, owner: str, file_id: str) -> AttachedFile:
    row = connection.execute(
        _SELECT + "a.collection = ? AND a.file_id = ?", (_key(connection, store, owner), file_id)
    ).fetchone()
    if row is None:
        raise NotFound("file", file_id)
    return _attached(row)


def _attached(row: Any) -> AttachedFile:
    file_id, name, status, code, message, attributes, *rest = row
    return AttachedFile(file_id, name, status, code, message, json.loads(attributes), *rest)


def _batch(connection: sqlite3.Connection, store: str, owner: str, batch_id: str) -> FileBatch:
    key = _key(connection, store, owner)
    row = connection.execute(
        "SELECT id, created_at FROM file_batches WHERE id = ? AND collection = ?", (batch_id, key)
    ).fetchone()
    if row is None:
        raise NotFound("file batch", batch_id)
    counts = file_counts(connection, "collection = ? AND batch_id = ?", (key, batch_id))
    return FileBatch(row[0], store, row[1], counts)
