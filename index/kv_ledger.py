"""The catalogue's books on KV: which chunks stand in front of which, which KV objects exist, which are out of date.

Knows nothing about keys and values: an object of the store is a digest, a kind and a size here.

Invariants: bookkeeping changes in the transaction that changes the chunks; an object whose chunk has left every
collection is in `kv_garbage` until its file is gone; a fused object that saw a chunk which has left is stale.
"""

from __future__ import annotations

import json
import sqlite3
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from index.database import Database
from index.errors import CollectionNotFound
from index.types import CollectionCounts, KVObject, Vanished

# A list of any length as one SQL parameter: its JSON.
_IN_LIST = "IN (SELECT value FROM json_each(?))"
_HAS_CHUNK = "EXISTS (SELECT 1 FROM chunks WHERE chunks.collection = ? AND chunks.chunk_id = {})"


class KVLedger:
    """Related chunks and KV objects of every collection. `Catalogue` extends it; use that."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def set_related(self, collection: str, related: Mapping[str, Sequence[str]]) -> None:
        """Sets, for each chunk id, the ordered ids of the chunks that its fused KV is computed behind.

        Entries with a chunk that is not in the collection (any more) are left out, so that a slow caller cannot bring
        back what a deletion has removed.
        """
        with self._database.write() as connection:
            key = self._key(connection, collection)
            wanted = json.dumps(sorted({*related, *(other for ids in related.values() for other in ids)}))
            known = {
                row[0]
                for row in connection.execute(
                    f"SELECT DISTINCT chunk_id FROM chunks WHERE collection = ? AND chunk_id {_IN_LIST}", (key, wanted)
                )
            }
            kept = {chunk_id: ids for chunk_id, ids in related.items() if known.issuperset((chunk_id, *ids))}
            connection.executemany(
                "DELETE FROM related WHERE collection = ? AND chunk_id = ?", [(key, chunk_id) for chunk_id in kept]
            )
            rows = [(key, chunk_id, i, other) for chunk_id, ids in kept.items() for i, other in enumerate(ids)]
            connection.executemany("INSERT INTO related VALUES (?, ?, ?, ?)", rows)
            self._bump_kv(connection, key)

    def related(self, collection: str, chunk_ids: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """The ordered related chunk ids of each of `chunk_ids` that has any."""
        found: dict[str, list[str]] = defaultdict(list)
        with self._database.read() as connection:
            key = self._key(connection, collection)
            for chunk_id, other in connection.execute(
                f"SELECT chunk_id, related_id FROM related WHERE collection = ? AND chunk_id {_IN_LIST} "
                "ORDER BY chunk_id, place",
                (key, json.dumps(list(chunk_ids))),
            ):
                found[chunk_id].append(other)
        return {chunk_id: tuple(others) for chunk_id, others in found.items()}

    def chunk_ids_by_row(self, collection: str) -> dict[int, str]:
        """Row id → chunk id of all chunks, ascending; a chunk id that several documents share comes once for each."""
        with self._database.read() as connection:
            key = self._key(connection, collection)
            return dict(connection.execute("SELECT id, chunk_id FROM chunks WHERE collection = ? ORDER BY id", (key,)))

    def chunk_ids_without_related(self, collection: str) -> set[str]:
        """Chunks whose related chunks are not known: new ones, and those that have lost one."""
        with self._database.read() as connection:
            rows = connection.execute(
                "SELECT DISTINCT chunk_id FROM chunks AS c WHERE collection = ? AND NOT EXISTS (SELECT 1 FROM related "
                "AS r WHERE r.collection = c.collection AND r.chunk_id = c.chunk_id)",
                (self._key(connection, collection),),
            )
            return {row[0] for row in rows}

    def token_ids(self, collection: str, chunk_ids: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """The token ids of those of `chunk_ids` that are in the collection."""
        with self._database.read() as connection:
            rows = connection.execute(
                "SELECT chunk_id, token_ids FROM chunks "
                f"WHERE collection = ? AND chunk_id {_IN_LIST} GROUP BY chunk_id",
                (self._key(connection, collection), json.dumps(list(chunk_ids))),
            )
            return {chunk_id: tuple(np.frombuffer(blob, "<i4").tolist()) for chunk_id, blob in rows}

    def record_kv(self, collection: str, objects: Iterable[KVObject]) -> None:
        """Books objects that have been written to the store.

        A fused object supersedes the stale ones of its chunk. An object whose chunk has left meanwhile becomes garbage;
        one whose related chunk has left is booked as stale.
        """
        with self._database.write() as connection:
            key = self._key(connection, collection)
            for item in objects:
                self._record(connection, key, item)
            self._bump_kv(connection, key)

    def kv_objects(self, collection: str, chunk_ids: Iterable[str] | None = None) -> list[KVObject]:
        """The booked objects of the collection, or of some of its chunks; ordered by chunk id, fused before raw."""
        only, values = ("", ()) if chunk_ids is None else (f" AND chunk_id {_IN_LIST}", (json.dumps(list(chunk_ids)),))
        with self._database.read() as connection:
            key = self._key(connection, collection)
            rows = connection.execute(
                "SELECT digest, chunk_id, kind, num_bytes, is_stale, (SELECT json_group_array(related_id) FROM "
                "(SELECT related_id FROM kv_seen AS s WHERE s.collection = o.collection AND s.digest = o.digest "
                f"ORDER BY place)) FROM kv_objects AS o WHERE collection = ?{only} ORDER BY chunk_id, kind, digest",
                (key, *values),
            )
            return [
                KVObject(digest, chunk_id, kind, num_bytes, tuple(json.loads(related)), bool(is_stale))
                for digest, chunk_id, kind, num_bytes, is_stale, related in rows
            ]

    def forget_kv(self, digests: Iterable[str]) -> None:
        """Strikes objects whose files are gone from the books of every collection and from the garbage."""
        listed = (json.dumps(list(digests)),)
        with self._database.write() as connection:
            keys = connection.execute(
                f"SELECT DISTINCT collection FROM kv_objects WHERE digest {_IN_LIST}", listed
            ).fetchall()
            connection.execute(f"DELETE FROM kv_objects WHERE digest {_IN_LIST}", listed)
            connection.execute(f"DELETE FROM kv_garbage WHERE digest {_IN_LIST}", listed)
            for (key,) in keys:
                self._bump_kv(connection, key)

    def discard_kv(self, digests: Iterable[str]) -> None:
        """Makes garbage of objects that were written but are booked nowhere."""
        with self._database.write() as connection:
            self._discard(connection, digests)

    def drop_stale_kv(self, collection: str, chunk_ids: Iterable[str]) -> None:
        """Strikes the stale objects of these chunks from the collection's books; see `kv_garbage`."""
        with self._database.write() as connection:
            key = self._key(connection, collection)
            where = f"collection = ? AND is_stale AND chunk_id {_IN_LIST}"
            self._drop_objects(connection, where, (key, json.dumps(list(chunk_ids))))
            self._bump_kv(connection, key)

    def kv_garbage(self) -> list[str]:
        """Digests of objects that nothing refers to any more: remove their files, then call `forget_kv`."""
        with self._database.read() as connection:
            return [row[0] for row in connection.execute("SELECT digest FROM kv_garbage ORDER BY digest")]

    def unbooked_kv(self, digests: Iterable[str]) -> list[str]:
        """Those of `digests` that are neither an object of a collection nor garbage."""
        with self._database.read() as connection:
            rows = connection.execute(
                "SELECT value FROM json_each(?) WHERE value NOT IN (SELECT digest FROM kv_objects) "
                "AND value NOT IN (SELECT digest FROM kv_garbage)",
                (json.dumps(list(digests)),),
            )
            return [row[0] for row in rows]

    def known_chunk_ids(self, chunk_ids: Iterable[str]) -> set[str]:
        """Those of `chunk_ids` that any collection has."""
        with self._database.read() as connection:
            select = f"SELECT DISTINCT chunk_id FROM chunks WHERE chunk_id {_IN_LIST}"
            return {row[0] for row in connection.execute(select, (json.dumps(list(chunk_ids)),))}

    def counts(self, collection: str) -> CollectionCounts:
        """The size of the collection and of its stored KV."""
        with self._database.read() as connection:
            key = self._key(connection, collection)
            (num_documents,) = connection.execute(
                "SELECT count(*) FROM documents WHERE collection = ?", (key,)
            ).fetchone()
            num_chunks, num_tokens = connection.execute(
                "SELECT count(*), coalesce(sum(size), 0) / 4 FROM (SELECT length(token_ids) AS size FROM chunks "
                "WHERE collection = ? GROUP BY chunk_id)",
                (key,),
            ).fetchone()
            kv = connection.execute(
                "SELECT count(CASE WHEN kind = 'raw' THEN 1 END), count(CASE WHEN kind = 'fused' AND NOT is_stale "
                "THEN 1 END), coalesce(sum(is_stale), 0), coalesce(sum(num_bytes), 0) FROM kv_objects "
                "WHERE collection = ?",
                (key,),
            ).fetchone()
        return CollectionCounts(num_documents, num_chunks, num_tokens, *kv)

    def _record(self, connection: sqlite3.Connection, key: int, item: KVObject) -> None:
        if not connection.execute(f"SELECT {_HAS_CHUNK.format('?')}", (key, item.chunk_id)).fetchone()[0]:
            self._discard(connection, [item.digest])
            return
        connection.execute("DELETE FROM kv_garbage WHERE digest = ?", (item.digest,))
        connection.execute("DELETE FROM kv_objects WHERE collection = ? AND digest = ?", (key, item.digest))
        if item.kind == "fused":
            stale = "collection = ? AND chunk_id = ? AND kind = 'fused' AND is_stale"
            self._drop_objects(connection, stale, (key, item.chunk_id))
        connection.execute(
            "INSERT INTO kv_objects VALUES (?, ?, ?, ?, ?, ?)",
            (key, item.digest, item.chunk_id, item.kind, item.num_bytes, item.is_stale),
        )
        connection.executemany(
            "INSERT INTO kv_seen VALUES (?, ?, ?, ?)", [(key, item.digest, i, r) for i, r in enumerate(item.related)]
        )
        connection.execute(
            "UPDATE kv_objects SET is_stale = 1 WHERE collection = ? AND digest = ? AND EXISTS (SELECT 1 FROM kv_seen "
            f"AS s WHERE s.collection = ? AND s.digest = ? AND NOT {_HAS_CHUNK.format('s.related_id')})",
            (key, item.digest, key, item.digest, key),
        )

    def _vanish(self, connection: sqlite3.Connection, key: int, chunk_ids: Iterable[str]) -> Vanished:
        """Settles the books for those of `chunk_ids` that are in no document of the collection any more."""
        gone = [
            row[0]
            for row in connection.execute(
                f"SELECT value FROM json_each(?) WHERE NOT {_HAS_CHUNK.format('value')} ORDER BY value",
                (json.dumps(sorted(set(chunk_ids))), key),
            )
        ]
        if not gone:
            return Vanished()
        listed = json.dumps(gone)
        connection.execute(
            "UPDATE kv_objects SET is_stale = 1 WHERE collection = ? AND digest IN "
            f"(SELECT digest FROM kv_seen WHERE collection = ? AND related_id {_IN_LIST})",
            (key, key, listed),
        )
        connection.execute(
            f"DELETE FROM related WHERE collection = ? AND (chunk_id {_IN_LIST} OR chunk_id IN "
            f"(SELECT chunk_id FROM related WHERE collection = ? AND related_id {_IN_LIST}))",
            (key, listed, key, listed),
        )
        digests = self._drop_objects(connection, f"collection = ? AND chunk_id {_IN_LIST}", (key, listed))
        self._bump_kv(connection, key)
        return Vanished(tuple(gone), tuple(digests))

    def _drop_objects(self, connection: sqlite3.Connection, where: str, values: tuple[object, ...]) -> list[str]:
        """Strikes objects from one collection's books; returns those that no other collection has."""
        digests = [row[0] for row in connection.execute(f"SELECT digest FROM kv_objects WHERE {where}", values)]
        connection.execute(f"DELETE FROM kv_objects WHERE {where}", values)
        return self._discard(connection, digests)

    @staticmethod
    def _discard(connection: sqlite3.Connection, digests: Iterable[str]) -> list[str]:
        """Makes garbage of the digests that no collection has; returns them."""
        rows = connection.execute(
            "INSERT INTO kv_garbage SELECT value FROM json_each(?) WHERE value NOT IN "
            "(SELECT digest FROM kv_objects) ON CONFLICT DO UPDATE SET digest = digest RETURNING digest",
            (json.dumps(sorted(set(digests))),),
        )
        return sorted(row[0] for row in rows)

    @staticmethod
    def _key(connection: sqlite3.Connection, name: str) -> int:
        row = connection.execute("SELECT id FROM collections WHERE name = ?", (name,)).fetchone()
        if row is None:
            known = connection.execute("SELECT name FROM collections ORDER BY name")
            raise CollectionNotFound(name, [other[0] for other in known])
        return int(row[0])

    @staticmethod
    def _bump_kv(connection: sqlite3.Connection, key: int) -> None:
        connection.execute("UPDATE collections SET kv_revision = kv_revision + 1 WHERE id = ?", (key,))
