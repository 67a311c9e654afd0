"""The catalogue: the truth about collections, documents, chunks and their vectors (and, by `KVLedger`, about KV).

Knows nothing about how text was read, cut or embedded, nor about the vector index, which can be rebuilt from here.

Invariants: a document changes in one transaction, with its chunks, vectors and KV bookkeeping; every such change raises
the collection's `revision`; row ids are never used again. Safe to use from several threads and processes.
"""

from __future__ import annotations

import json
import re
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import numpy as np

from index import filters, lexical
from index.database import Database
from index.errors import CollectionMismatch, CollectionNotFound, InvalidValue
from index.filters import Filter
from index.kv_ledger import KVLedger
from index.library_types import DAY_S
from index.types import Chunk, Collection, Document, FloatArray, IntArray, StoredChunk, StoredDocument, Vanished

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_PAGE_ROWS = 512
_TOUCH_INTERVAL_S = 60
_COLLECTION = "id, name, owner, encoder_fingerprint, embedding_fingerprint, dim, revision, kv_revision"
_STORED_CHUNK = (
    "SELECT c.id, c.title, c.text, c.token_ids, d.document_id, c.ordinal, c.page, d.source "
    "FROM chunks AS c JOIN documents AS d ON d.id = c.document WHERE c.collection = ?"
)


class Catalogue(KVLedger):
    """One catalogue file. A context manager; `close` it otherwise.

    Every method raises CollectionNotFound for an unknown collection name, and CatalogueError (StorageFull on a full
    disk) where the file cannot be read or written.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(Database(Path(path)))

    def __enter__(self) -> Catalogue:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._database.close()

    @property
    def database(self) -> Database:
        """The file itself, for the other books that are kept in it."""
        return self._database

    def open_collection(
        self,
        name: str,
        encoder_fingerprint: str,
        embedding_fingerprint: str,
        dim: int,
        create: bool = True,
    ) -> Collection:
        """The collection of this name, whoever owns it; made first, as the operator's, if absent and `create`.

        Raises InvalidValue for a name other than 1 to 64 of A-Z a-z 0-9 _ . -, and CollectionMismatch where the
        collection was made with another encoder or embedding model.
        """
        if not _NAME.fullmatch(name):
            raise InvalidValue("collection", f"must be 1 to 64 of the characters A-Z a-z 0-9 _ . -, got {name!r}")
        if create:
            with self._database.write() as connection:
                connection.execute(
                    "INSERT INTO collections (name, encoder_fingerprint, embedding_fingerprint, dim) "
                    "VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING",
                    (name, encoder_fingerprint, embedding_fingerprint, dim),
                )
        found = self.collection(name)
        if found.encoder_fingerprint != encoder_fingerprint:
            raise CollectionMismatch(name, "passage encoder", found.encoder_fingerprint, encoder_fingerprint)
        if (found.embedding_fingerprint, found.dim) != (embedding_fingerprint, dim):
            raise CollectionMismatch(name, "embedding model", found.embedding_fingerprint, embedding_fingerprint)
        return found

    def collection(self, name: str, owner: str | None = None) -> Collection:
        """The collection of this name. With `owner`, somebody else's is as unknown as one that is not there."""
        with self._database.read() as connection:
            row = connection.execute(f"SELECT {_COLLECTION} FROM collections WHERE name = ?", (name,)).fetchone()
        found = None if row is None else Collection(*row)
        if found is None or owner not in (None, found.owner):
            raise CollectionNotFound(name, [c.name for c in self.collections(owner)])
        return found

    def use_collection(self, name: str, owner: str) -> Collection:
        """The collection, on behalf of somebody who uses it: that puts off its end. Raises InvalidValue once expired.

        Notes the time at most once a minute, and not at all where it would have to wait for a writer.
        """
        found, now = self.collection(name, owner), int(time.time())
        with self._database.read() as connection:
            select = "SELECT ? - last_active_at, expires_after_days FROM collections WHERE id = ?"
            idle_s, days = connection.execute(select, (now, found.collection_id)).fetchone() or (0, None)
            if days is not None and idle_s >= days * DAY_S:
                raise InvalidValue("collection", f"{name!r} has expired; make a new one with the same files")
            if idle_s >= _TOUCH_INTERVAL_S:
                with suppress(sqlite3.OperationalError), self._database.impatient(connection):
                    touch = "UPDATE collections SET last_active_at = ? WHERE id = ?"
                    connection.execute(touch, (now, found.collection_id))
        return found

    def collections(self, owner: str | None = None) -> list[Collection]:
        """All collections, or those of one owner, by name."""
        with self._database.read() as connection:
            rows = connection.execute(f"SELECT {_COLLECTION} FROM collections ORDER BY name").fetchall()
        return [c for c in (Collection(*row) for row in rows) if owner in (None, c.owner)]

    def delete_collection(self, name: str) -> Vanished:
        """Removes the collection with all that belongs to it."""
        with self._database.write() as connection:
            key = self._key(connection, name)
            query = "SELECT DISTINCT chunk_id FROM chunks WHERE collection = ? ORDER BY chunk_id"
            chunk_ids = tuple(row[0] for row in connection.execute(query, (key,)))
            digests = self._drop_objects(connection, "collection = ?", (key,))
            connection.execute("DELETE FROM collections WHERE id = ?", (key,))
            lexical.drop_words(connection, key)
        return Vanished(chunk_ids, tuple(digests))

    def documents(self, collection: str) -> list[StoredDocument]:
        """All documents, in the order in which they were first added or last replaced."""
        with self._database.read() as connection:
            rows = connection.execute(
                "SELECT document_id, title, source, metadata, (SELECT count(*) FROM chunks WHERE document = d.id) "
                "FROM documents AS d WHERE collection = ? ORDER BY id",
                (self._key(connection, collection),),
            ).fetchall()
        return [
            StoredDocument(document_id, title, source, json.loads(metadata), num_chunks)
            for document_id, title, source, metadata, num_chunks in rows
        ]

    def document_ids(self, collection: str, prefix: str = "") -> set[str]:
        """Ids of the documents whose id starts with `prefix`, e.g. of all records of one file."""
        with self._database.read() as connection:
            rows = connection.execute(
                "SELECT document_id FROM documents WHERE collection = ? AND document_id >= ? AND document_id < ?",
                (self._key(connection, collection), prefix, prefix + "\U0010ffff"),
            )
            return {row[0] for row in rows}

    def document_hash(self, collection: str, document_id: str) -> str | None:
        """The `ingest_hash` given with the document, or None where there is no such document."""
        with self._database.read() as connection:
            row = connection.execute(
                "SELECT ingest_hash FROM documents WHERE collection = ? AND document_id = ?",
                (self._key(connection, collection), document_id),
            ).fetchone()
        return None if row is None else str(row[0])

    def replace_document(
        self,
        collection: str,
        document: Document,
        chunks: Sequence[Chunk],
        vectors: FloatArray,
        ingest_hash: str | None = None,
        guard: Callable[[sqlite3.Connection], None] | None = None,
    ) -> Vanished:
        """Adds the document, or puts it in the place of the one with its id, in one transaction.

        vectors: float32 [len(chunks), dim], unit length. ingest_hash: what `document_hash` will return; the document's
        content hash if None. guard: called first within the transaction; what it raises undoes it and is raised.
        Returns the chunks that left the collection with the old content.
        """
        with self._database.write() as connection:
            if guard is not None:
                guard(connection)
            key = self._key(connection, collection)
            (dim,) = connection.execute("SELECT dim FROM collections WHERE id = ?", (key,)).fetchone()
            if vectors.shape != (len(chunks), dim):
                raise InvalidValue("vectors", f"shape must be {(len(chunks), dim)}, got {vectors.shape}")
            old = self._remove_document(connection, key, document.document_id)
            row = connection.execute(
                "INSERT INTO documents (collection, document_id, ingest_hash, title, source, metadata) "
                "VALUES (?, ?, ?, ?, ?, ?) RETURNING id",
                (
                    key,
                    document.document_id,
                    document.content_hash if ingest_hash is None else ingest_hash,
                    document.title,
                    document.source,
                    json.dumps(dict(document.metadata)),
                ),
            ).fetchone()[0]
            connection.executemany(
                "INSERT INTO chunks (collection, document, ordinal, chunk_id, title, text, page, token_ids, vector) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [(key, row, *_chunk_row(c), v.tobytes()) for c, v in zip(chunks, vectors.astype("<f4"), strict=True)],
            )
            lexical.add_words(connection, key, row)
            self._bump(connection, key)
            return self._vanish(connection, key, old)

    def delete_document(self, collection: str, document_id: str) -> Vanished:
        """Removes the document and those of its chunks that no other document has; nothing if there is none."""
        with self._database.write() as connection:
            key = self._key(connection, collection)
            old = self._remove_document(connection, key, document_id)
            return self._vanish(connection, key, old)

    def remove_documents(
        self, connection: sqlite3.Connection, key: int, first: str = "", end: str = "\U0010ffff"
    ) -> Vanished:
        """Removes the documents with ids in [first, end), within the transaction of the caller.

        key: `Collection.collection_id`.
        """
        rows = connection.execute(
            "SELECT document_id FROM documents WHERE collection = ? AND document_id >= ? AND document_id < ?",
            (key, first, end),
        ).fetchall()
        old = [chunk_id for (row,) in rows for chunk_id in self._remove_document(connection, key, row)]
        return self._vanish(connection, key, old)

    def chunks(self, collection: str) -> Iterator[StoredChunk]:
        """All chunks by row id. A chunk id that several documents share comes once for each.

        Read in pages, so that nothing is held open: of changes made meanwhile, some may be seen.
        """
        last = -1
        while True:
            with self._database.read() as connection:
                rows = connection.execute(
                    f"{_STORED_CHUNK} AND c.id > ? ORDER BY c.id LIMIT {_PAGE_ROWS}",
                    (self._key(connection, collection), last),
                ).fetchall()
            yield from map(_stored_chunk, rows)
            if len(rows) < _PAGE_ROWS:
                return
            last = rows[-1][0]

    def chunks_by_row(self, collection: str, row_ids: Iterable[int]) -> dict[int, StoredChunk]:
        """The chunks of the row ids; those that have been removed are missing."""
        with self._database.read() as connection:
            rows = connection.execute(
                f"{_STORED_CHUNK} AND c.id IN (SELECT value FROM json_each(?))",
                (self._key(connection, collection), json.dumps([int(i) for i in row_ids])),
            )
            return {row[0]: _stored_chunk(row) for row in rows}

    def chunk(self, collection: str, chunk_id: str) -> StoredChunk | None:
        """A chunk with this id (that of the oldest document, if several share it), or None."""
        with self._database.read() as connection:
            row = connection.execute(
                f"{_STORED_CHUNK} AND c.chunk_id = ? ORDER BY c.id LIMIT 1",
                (self._key(connection, collection), chunk_id),
            ).fetchone()
        return None if row is None else _stored_chunk(row)

    def row_ids(self, collection: str) -> IntArray:
        """int64 [n]: the row ids of all chunks, ascending."""
        with self._database.read() as connection:
            key = self._key(connection, collection)
            rows = connection.execute("SELECT id FROM chunks WHERE collection = ? ORDER BY id", (key,))
            return np.fromiter((row[0] for row in rows), np.int64)

    def vectors(self, collection: str, row_ids: Iterable[int] | None = None) -> tuple[IntArray, FloatArray]:
        """Row ids int64 [n], ascending, and their vectors float32 [n, dim]: of all chunks, or of those asked for."""
        only, values = ("", ()) if row_ids is None else (" AND id IN (SELECT value FROM json_each(?))", (row_ids,))
        with self._database.read() as connection:
            key = self._key(connection, collection)
            (dim,) = connection.execute("SELECT dim FROM collections WHERE id = ?", (key,)).fetchone()
            rows = connection.execute(
                f"SELECT id, vector FROM chunks WHERE collection = ?{only} ORDER BY id",
                (key, *(json.dumps([int(i) for i in v]) for v in values)),
            )
            ids, blob = [], bytearray()
            for row_id, vector in rows:
                ids.append(row_id)
                blob += vector
        return np.array(ids, np.int64), np.frombuffer(blob, "<f4").astype(np.float32, copy=False).reshape(-1, dim)

    def rows_where(self, collection: str, condition: Filter) -> IntArray:
        """int64 [n]: the row ids of the chunks whose document's metadata fits the condition, ascending."""
        fits, values = filters.where(condition, "d.metadata")
        with self._database.read() as connection:
            key = self._key(connection, collection)
            rows = connection.execute(
                "SELECT c.id FROM chunks AS c JOIN documents AS d ON d.id = c.document "
                f"WHERE d.collection = ? AND {fits} ORDER BY c.id",
                (key, *values),
            )
            return np.fromiter((row[0] for row in rows), np.int64)

    def rows_by_words(
        self, collection: str, question: str, limit: int, row_ids: Iterable[int] | None = None
    ) -> list[tuple[int, float]]:
        """(row id, BM25 value) of the `limit` chunks that share most with the question's words; see `lexical`."""
        with self._database.read() as connection:
            key = self._key(connection, collection)
            return lexical.search_words(connection, key, question, limit, row_ids)

    @classmethod
    def _remove_document(cls, connection: sqlite3.Connection, key: int, document_id: str) -> list[str]:
        """Deletes the document's rows, if it is there; returns the ids of its chunks."""
        found = connection.execute(
            "SELECT id FROM documents WHERE collection = ? AND document_id = ?", (key, document_id)
        ).fetchone()
        if found is None:
            return []
        chunk_ids = [row[0] for row in connection.execute("SELECT chunk_id FROM chunks WHERE document = ?", found)]
        lexical.remove_words(connection, key, found[0])
        connection.execute("DELETE FROM documents WHERE id = ?", found)
        cls._bump(connection, key)
        return chunk_ids

    @staticmethod
    def _bump(connection: sqlite3.Connection, key: int) -> None:
        connection.execute("UPDATE collections SET revision = revision + 1 WHERE id = ?", (key,))


def _chunk_row(chunk: Chunk) -> tuple[object, ...]:
    token_ids = np.asarray(chunk.token_ids, "<i4").tobytes()
    return chunk.ordinal, chunk.chunk_id, chunk.title, chunk.text, chunk.page, token_ids


def _stored_chunk(row: tuple[int, str, str, bytes, str, int, int | None, str]) -> StoredChunk:
    row_id, title, text, token_ids, document_id, ordinal, page, source = row
    ids = tuple(np.frombuffer(token_ids, "<i4").tolist())
    return StoredChunk(row_id, Chunk(title, text, ids, document_id, ordinal, page), source)
