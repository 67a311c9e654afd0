"""The SQLite file behind the catalogue: its schema, its connections, its transactions.

Knows nothing about what the rows mean.

Invariants: every write runs in one `BEGIN IMMEDIATE` transaction, so that several processes take turns and a crash
leaves the state before or after, never between; a file with another schema version is refused, never altered. Safe to
use from several threads: each use takes a connection of its own from a pool.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from index.errors import CatalogueError, CatalogueVersionError, StorageFull

SCHEMA_VERSION = 2
_BUSY_TIMEOUT_S = 60.0
_NOT_SQLITE = "file is not a database"

_SCHEMA = """
CREATE TABLE collections (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL UNIQUE,  -- also the id of the vector store that it is to API clients
    owner TEXT NOT NULL DEFAULT '',  -- name of the API key it belongs to; '': the operator's
    title TEXT NOT NULL DEFAULT '',
    description TEXT NOT NULL DEFAULT '',
    metadata TEXT NOT NULL DEFAULT '{}',  -- JSON object
    created_at INTEGER NOT NULL DEFAULT (CAST(strftime('%s', 'now') AS INTEGER)),
    last_active_at INTEGER NOT NULL DEFAULT (CAST(strftime('%s', 'now') AS INTEGER)),
    expires_after_days INTEGER,  -- counted from last_active_at; NULL: never
    encoder_fingerprint TEXT NOT NULL,
    embedding_fingerprint TEXT NOT NULL,
    dim INTEGER NOT NULL,
    revision INTEGER NOT NULL DEFAULT 0,
    kv_revision INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE documents (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    collection INTEGER NOT NULL REFERENCES collections ON DELETE CASCADE,
    document_id TEXT NOT NULL,
    ingest_hash TEXT NOT NULL,
    title TEXT NOT NULL,
    source TEXT NOT NULL,
    metadata TEXT NOT NULL,  -- JSON object
    UNIQUE (collection, document_id)
);
CREATE TABLE chunks (
    id INTEGER PRIMARY KEY AUTOINCREMENT,  -- the row id in the vector index, never used again
    collection INTEGER NOT NULL REFERENCES collections ON DELETE CASCADE,
    document INTEGER NOT NULL REFERENCES documents ON DELETE CASCADE,
    ordinal INTEGER NOT NULL,
    chunk_id TEXT NOT NULL,
    title TEXT NOT NULL,
    text TEXT NOT NULL,
    page INTEGER,
    token_ids BLOB NOT NULL,  -- little-endian int32
    vector BLOB NOT NULL,  -- little-endian float32
    UNIQUE (document, ordinal)
);
CREATE INDEX chunks_of_collection ON chunks (collection);
CREATE INDEX chunks_by_chunk_id ON chunks (collection, chunk_id);
CREATE TABLE related (
    collection INTEGER NOT NULL REFERENCES collections ON DELETE CASCADE,
    chunk_id TEXT NOT NULL,
    place INTEGER NOT NULL,
    related_id TEXT NOT NULL,
    PRIMARY KEY (collection, chunk_id, place)
) WITHOUT ROWID;
CREATE INDEX related_by_related_id ON related (collection, related_id);
CREATE TABLE kv_objects (
    collection INTEGER NOT NULL REFERENCES collections ON DELETE CASCADE,
    digest TEXT NOT NULL,
    chunk_id TEXT NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('raw', 'fused')),
    num_bytes INTEGER NOT NULL,
    is_stale INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (collection, digest)
) WITHOUT ROWID;
CREATE INDEX kv_by_chunk_id ON kv_objects (collection, chunk_id);
CREATE INDEX kv_by_digest ON kv_objects (digest);
CREATE TABLE kv_seen (  -- the related chunks that a fused KV object was computed behind
    collection INTEGER NOT NULL,
    digest TEXT NOT NULL,
    place INTEGER NOT NULL,
    related_id TEXT NOT NULL,
    PRIMARY KEY (collection, digest, place),
    FOREIGN KEY (collection, digest) REFERENCES kv_objects ON DELETE CASCADE
) WITHOUT ROWID;
CREATE INDEX kv_seen_by_related_id ON kv_seen (collection, related_id);
CREATE TABLE files (  -- what was uploaded; the bytes lie in the data directory under the id
    id TEXT PRIMARY KEY,
    owner TEXT NOT NULL,
    filename TEXT NOT NULL,
    purpose TEXT NOT NULL,
    num_bytes INTEGER NOT NULL,
    created_at INTEGER NOT NULL,
    expires_at INTEGER
) WITHOUT ROWID;
CREATE INDEX files_of_owner ON files (owner, created_at);
CREATE TABLE file_batches (
    id TEXT PRIMARY KEY,
    collection INTEGER NOT NULL REFERENCES collections ON DELETE CASCADE,
    created_at INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE collection_files (  -- uploaded files attached to a collection, and the queue of those to ingest
    collection INTEGER NOT NULL REFERENCES collections ON DELETE CASCADE,
    file_id TEXT NOT NULL REFERENCES files ON DELETE CASCADE,
    batch_id TEXT REFERENCES file_batches ON DELETE SET NULL,
    status TEXT NOT NULL CHECK (status IN ('in_progress', 'completed', 'cancelled', 'failed')),
    error_code TEXT,
    error_message TEXT,
    attributes TEXT NOT NULL DEFAULT '{}',  -- JSON object
    chunk_tokens INTEGER,  -- NULL: the server's own
    chunk_overlap_tokens INTEGER,
    created_at INTEGER NOT NULL,
    PRIMARY KEY (collection, file_id)
) WITHOUT ROWID;
CREATE INDEX collection_files_by_file ON collection_files (file_id);
CREATE INDEX collection_files_waiting ON collection_files (created_at) WHERE status = 'in_progress';
CREATE TABLE responses (  -- answers kept for `previous_response_id`
    id TEXT PRIMARY KEY,
    owner TEXT NOT NULL,
    created_at INTEGER NOT NULL,
    body TEXT NOT NULL  -- JSON object
) WITHOUT ROWID;
CREATE TABLE api_keys (
    name TEXT PRIMARY KEY,  -- also the owner's name
    key_hash BLOB NOT NULL UNIQUE,  -- SHA-256 of the key
    created_at INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE kv_garbage (digest TEXT PRIMARY KEY) WITHOUT ROWID;  -- objects whose files are still to be removed
"""


class Database:
    """Connections to one SQLite file, made on demand and kept for the next use."""

    def __init__(self, path: Path) -> None:
        """Opens or creates the file. Raises CatalogueVersionError or CatalogueError where it is not ours."""
        self.path = path
        self._idle: list[sqlite3.Connection] = []
        self._lock = threading.Lock()
        try:
            self._prepare()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Closes the idle connections; one in use is closed when it comes back idle and `close` runs again."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """A connection for reading. Each statement sees the last committed state."""
        with self._errors_named():
            connection = self._take()
            try:
                yield connection
            finally:
                with self._lock:
                    self._idle.append(connection)

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """A connection inside a write transaction: committed at the end, rolled back on any exception."""
        with self.read() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):  # a full disk may have rolled it back already
                    connection.execute("ROLLBACK")
                raise

    @staticmethod
    @contextmanager
    def impatient(connection: sqlite3.Connection) -> Iterator[None]:
        """Within, a write that another writer is in the way of fails at once, with sqlite3.OperationalError."""
        connection.execute("PRAGMA busy_timeout = 0")
        try:
            yield
        finally:
            connection.execute(f"PRAGMA busy_timeout = {int(_BUSY_TIMEOUT_S * 1e3)}")

    def _take(self) -> sqlite3.Connection:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        # check_same_thread: the pool hands a connection from thread to thread, but never to two at a time.
        connection = sqlite3.connect(self.path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA synchronous = NORMAL")  # with WAL: a crash of the process loses nothing
        return connection

    def _prepare(self) -> None:
        with self.read() as connection:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version == SCHEMA_VERSION:
                return
            connection.execute("PRAGMA journal_mode = WAL")
        with self.write() as connection:  # another process may have made the schema meanwhile
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            is_empty = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
            if version == 0 and is_empty:
                for statement in _SCHEMA.split(";\n"):
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            elif version != SCHEMA_VERSION:
                raise CatalogueVersionError(
                    f"{self.path} has schema version {version}, this program reads version {SCHEMA_VERSION}; "
                    "run the version that made it, or ingest into a new data directory"
                )

    @contextmanager
    def _errors_named(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            if "disk is full" in str(error):
                raise StorageFull(
                    f"{self.path}: no space left on the device; free some and run again (committed work is kept)"
                ) from error
            remedy = "is it a catalogue?" if _NOT_SQLITE in str(error) else "check the disk, rights and other processes"
            raise CatalogueError(f"{self.path}: {error}; {remedy}") from error
