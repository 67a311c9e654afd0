"""Vector stores: collections as their owners see them.

Knows nothing about embedding, searching or HTTP.

Invariant: everything is looked up together with its owner; somebody else's vector store is as unknown as none.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterable, Sequence
from typing import Any

from index.attached_files import attach_files, file_counts, key_in_use
from index.catalogue import Catalogue
from index.data_dir import DataDir
from index.errors import CollectionNotFound, InvalidValue, NotFound
from index.library_types import DAY_S, Attachment, CitedFile, MadeWith, VectorStore, VectorStoreSettings
from index.paging import Page, PageRequest, Place, made_at, new_id, read_page
from index.types import CollectionCounts, file_of

_PREFIX = "vs_"
_COLUMNS = (
    "id, name, title, description, metadata, expires_after_days, created_at, last_active_at, revision, kv_revision"
)
_PASSAGE_BYTES = (
    "SELECT coalesce(sum(length(CAST(text AS BLOB)) + length(token_ids) + length(vector)), 0) "
    "FROM chunks WHERE collection = ?"
)


class VectorStores:
    """The vector stores of all owners. Safe to use from many threads."""

    def __init__(self, catalogue: Catalogue, data_dir: DataDir) -> None:
        self._catalogue, self._data_dir = catalogue, data_dir
        self._database = catalogue.database
        self._sizes: dict[str, tuple[tuple[int, int, int], CollectionCounts, int]] = {}

    def create(
        self, owner: str, settings: VectorStoreSettings, made_with: MadeWith, attachments: Sequence[Attachment] = ()
    ) -> VectorStore:
        """Raises NotFound for an unknown file; nothing is made then."""
        id = new_id(_PREFIX)
        with self._database.write() as connection:
            key = connection.execute(
                "INSERT INTO collections (name, owner, title, description, metadata, expires_after_days, created_at, "
                "last_active_at, encoder_fingerprint, embedding_fingerprint, dim) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    id,
                    owner,
                    settings.title,
                    settings.description,
                    json.dumps(dict(settings.metadata)),
                    settings.expires_after_days,
                    made_at(id),
                    made_at(id),
                    made_with.encoder_fingerprint,
                    made_with.embedding_fingerprint,
                    made_with.dim,
                ),
            ).lastrowid
            assert key is not None
            attach_files(connection, key, owner, attachments)
        return self.get(id, owner)

    def get(self, id: str, owner: str) -> VectorStore:
        """Raises NotFound."""
        with self._database.read() as connection:
            row = connection.execute(
                f"SELECT {_COLUMNS} FROM collections WHERE name = ? AND owner = ?", (id, owner)
            ).fetchone()
        if row is None:
            raise NotFound("vector store", id)
        try:
            return self._described(row)
        except CollectionNotFound as error:  # deleted since
            raise NotFound("vector store", id) from error

    def page(self, owner: str, request: PageRequest) -> Page[VectorStore]:
        """The vector stores of one owner, by the time of their making."""
        select = f"SELECT {_COLUMNS} FROM collections WHERE owner = ?"
        with self._database.read() as connection:
            rows, has_more = read_page(
                connection, select, (owner,), ("created_at", "name"), request, lambda id: _place(connection, id, owner)
            )
        return Page(tuple(self._still_there(rows)), has_more)

    def update(self, id: str, owner: str, settings: VectorStoreSettings) -> VectorStore:
        """Sets all of `settings`. Raises NotFound, and InvalidValue for one that has expired."""
        values = settings.title, settings.description, json.dumps(dict(settings.metadata)), settings.expires_after_days
        with self._database.write() as connection:
            key = key_in_use(connection, id, owner)
            connection.execute(
                "UPDATE collections SET title = ?, description = ?, metadata = ?, expires_after_days = ? WHERE id = ?",
                (*values, key),
            )
        return self.get(id, owner)

    def delete(self, id: str, owner: str) -> None:
        """Removes the vector store and all that was read from its files, not the files. Raises NotFound."""
        try:
            self._catalogue.collection(id, owner)
            self._catalogue.delete_collection(id)
        except CollectionNotFound as error:
            raise NotFound("vector store", id) from error
        self._sizes.pop(id, None)
        self._data_dir.index_file(id).unlink(missing_ok=True)

    def use(self, id: str, owner: str) -> None:
        """Puts off its end. Raises NotFound, and InvalidValue for one that has expired."""
        try:
            self._catalogue.use_collection(id, owner)
        except CollectionNotFound as error:
            raise NotFound("vector store", id) from error
        except InvalidValue as error:
            raise InvalidValue("vector_store_id", str(error).partition(": ")[2]) from error

    def cited(self, id: str, document_ids: Iterable[str]) -> dict[str, CitedFile]:
        """What to call the documents in search results; those that have been removed since are missing."""
        with self._database.read() as connection:
            rows = connection.execute(
                "SELECT d.document_id, d.source, d.metadata FROM documents AS d JOIN collections AS c "
                "ON c.id = d.collection WHERE c.name = ? AND d.document_id IN (SELECT value FROM json_each(?))",
                (id, json.dumps(list(document_ids))),
            ).fetchall()
            files = {file_id for row in rows if (file_id := file_of(row[0]))}
            attached = {
                file_id: CitedFile(file_id, filename, json.loads(attributes))
                for file_id, filename, attributes in connection.execute(
                    "SELECT f.id, f.filename, a.attributes FROM collection_files AS a JOIN files AS f ON f.id = "
                    "a.file_id JOIN collections AS c ON c.id = a.collection WHERE c.name = ? AND f.id IN "
                    "(SELECT value FROM json_each(?))",
                    (id, json.dumps(sorted(files))),
                )
            }
        return {
            document_id: attached.get(file_of(document_id) or "")
            or CitedFile(document_id, source, json.loads(metadata))
            for document_id, source, metadata in rows
        }

    def sweep(self) -> None:
        """Empties the vector stores that have expired, and removes vector indexes that belong to none."""
        with self._database.write() as connection:
            expired = connection.execute(
                f"SELECT id FROM collections AS c WHERE last_active_at + expires_after_days * {DAY_S} <= ? AND "
                "(EXISTS (SELECT 1 FROM documents AS d WHERE d.collection = c.id) OR "
                "EXISTS (SELECT 1 FROM collection_files AS f WHERE f.collection = c.id))",
                (int(time.time()),),
            ).fetchall()
            for (key,) in expired:
                connection.execute("DELETE FROM collection_files WHERE collection = ?", (key,))
                self._catalogue.remove_documents(connection, key)
        indexes = list(self._data_dir.faiss.glob(f"{_PREFIX}*.faiss"))
        names = {collection.name for collection in self._catalogue.collections()}
        for path in indexes:
            if path.stem not in names:
                path.unlink(missing_ok=True)

    def _still_there(self, rows: Iterable[Any]) -> Iterable[VectorStore]:
        for row in rows:
            try:
                yield self._described(row)
            except CollectionNotFound:  # deleted since
                continue

    def _described(self, row: Any) -> VectorStore:
        key, name, title, description, metadata, days, created_at, last_active_at, revision, kv_revision = row
        mark = (key, revision, kv_revision)
        if name not in self._sizes or self._sizes[name][0] != mark:
            size = self._catalogue.counts(name)
            with self._database.read() as connection:
                (passage_bytes,) = connection.execute(_PASSAGE_BYTES, (key,)).fetchone()
            self._sizes[name] = (mark, size, passage_bytes)
        _, size, passage_bytes = self._sizes[name]
        with self._database.read() as connection:
            counts = file_counts(connection, "collection = ?", (key,))
        settings = VectorStoreSettings(title, description, json.loads(metadata), days)
        return VectorStore(name, settings, created_at, last_active_at, counts, size, passage_bytes)


def _place(connection: sqlite3.Connection, id: str, owner: str) -> Place:
    row = connection.execute("SELECT created_at FROM collections WHERE name = ? AND owner = ?", (id, owner)).fetchone()
    if row is None and not id.startswith(_PREFIX):
        raise ValueError("no id of a vector store")
    return (made_at(id) if row is None else row[0], id)
