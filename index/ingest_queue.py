"""The queue of uploaded files to ingest: the rows of `collection_files` that are in progress.

Knows nothing about how a file is read, nor which process does it.

Invariants: a job is waiting until one transaction completes or fails it, so that whatever ends a process in between
loses nothing; a file is complete only with all of its documents and no others, failed or cancelled only with none. One
process at a time works on the queue of a data directory (`working`), whoever asked for the work.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from index.catalogue import Catalogue
from index.data_dir import DataDir
from index.documents import UploadedAs
from index.errors import DataDirError, DataDirLocked, JobWithdrawn
from index.files import documents_of
from index.library_types import IngestErrorCode

POLL_S = 0.2  # how often a lock that another process holds is tried again
_JOBS = (
    "SELECT c.id, c.name, a.file_id, f.filename, a.attributes, a.chunk_tokens, a.chunk_overlap_tokens "
    "FROM collection_files AS a JOIN collections AS c ON c.id = a.collection JOIN files AS f ON f.id = a.file_id "
    "WHERE a.status = 'in_progress'"
)
_ONE = " AND c.name = ? AND a.file_id = ?"


@dataclass(frozen=True)
class IngestJob:
    """One uploaded file on its way into one collection. Sizes that are None are the server's own."""

    collection: str
    file_id: str
    filename: str
    path: Path
    attributes: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    chunk_tokens: int | None = None
    chunk_overlap_tokens: int | None = None

    @property
    def key(self) -> tuple[str, str]:
        """Collection and file id: what tells waiting jobs apart."""
        return self.collection, self.file_id

    @property
    def upload(self) -> UploadedAs:
        return UploadedAs(self.file_id, self.filename)


class IngestQueue:
    """Reads and settles jobs. Safe to use from several threads and processes; raises CatalogueError and its kin."""

    def __init__(self, catalogue: Catalogue, data_dir: DataDir) -> None:
        self._catalogue, self._data_dir = catalogue, data_dir
        self._database = catalogue.database  # a job ends in one transaction with its documents

    def waiting(self, limit: int = -1) -> list[IngestJob]:
        """The jobs to do, oldest first; at most `limit` of them, if that is not negative."""
        with self._database.read() as connection:
            rows = connection.execute(f"{_JOBS} ORDER BY a.created_at, f.created_at, a.file_id LIMIT ?", (limit,))
            return [self._job(row) for row in rows]

    def is_wanted(self, job: IngestJob) -> bool:
        """Whether the job still waits, with the same settings."""
        with self._database.read() as connection, suppress(JobWithdrawn):
            self._require(connection, job)
            return True
        return False

    def guard(self, job: IngestJob) -> Callable[[sqlite3.Connection], None]:
        """For `Catalogue.replace_document`: raises JobWithdrawn unless the job still waits, with the same settings."""

        def check(connection: sqlite3.Connection) -> None:
            self._require(connection, job)

        return check

    def complete(self, job: IngestJob, document_ids: Collection[str]) -> bool:
        """Marks the job as done, if all of `document_ids` are stored, and removes all other documents of its file.

        False: they are not, because the file was detached and attached again meanwhile; the job waits on. Raises
        JobWithdrawn where it is not wanted any more.
        """
        wanted = frozenset(document_ids)
        with self._database.write() as connection:
            key = self._require(connection, job)
            rows = connection.execute(
                "SELECT document_id FROM documents WHERE collection = ? AND document_id >= ? AND document_id < ?",
                (key, *documents_of(job.file_id)),
            )
            stored = {row[0] for row in rows}
            if not wanted.issubset(stored):
                return False
            for document_id in sorted(stored - wanted):
                self._catalogue.remove_documents(connection, key, document_id, f"{document_id}\0")
            _settle(connection, key, job, "completed", None, None)
        return True

    def fail(self, job: IngestJob, code: IngestErrorCode, message: str) -> None:
        """Marks the job as failed and removes the documents of its file. Raises JobWithdrawn, as `complete` does."""
        with self._database.write() as connection:
            key = self._require(connection, job)
            self._catalogue.remove_documents(connection, key, *documents_of(job.file_id))
            _settle(connection, key, job, "failed", code, message)

    def clear(self, job: IngestJob) -> None:
        """Removes what was stored for a job that was withdrawn, unless its file has been attached anew."""
        with self._database.write() as connection:
            found = connection.execute("SELECT id FROM collections WHERE name = ?", (job.collection,)).fetchone()
            if found is None:
                return  # its documents went with it
            attached = connection.execute(
                "SELECT status FROM collection_files WHERE collection = ? AND file_id = ?", (found[0], job.file_id)
            ).fetchone()
            if attached in (None, ("cancelled",)):
                self._catalogue.remove_documents(connection, found[0], *documents_of(job.file_id))

    @contextmanager
    def working(self) -> Iterator[None]:
        """Holds the queue: waits until no other process works on it. Ends with the process, however that dies."""
        path = self._data_dir.path / "ingest.lock"
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise DataDirError(f"{path} cannot be opened ({error.strerror}); check the disk and its rights") from error
        try:
            while not _is_locked(descriptor):
                time.sleep(POLL_S)
            yield
        finally:
            os.close(descriptor)

    @contextmanager
    def writing(self, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
        """Holds the data directory exclusively, as every change of documents must; waits for whoever has it now.

        on_wait: called now and then while it waits.
        """
        with ExitStack() as held:
            while True:
                try:
                    held.enter_context(self._data_dir.lock(exclusive=True))
                    break
                except DataDirLocked:
                    if on_wait is not None:
                        on_wait()
                    time.sleep(POLL_S)
            yield

    def _job(self, row: tuple[int, str, str, str, str, int | None, int | None]) -> IngestJob:
        _, collection, file_id, filename, attributes, chunk_tokens, overlap = row
        path = self._data_dir.files / file_id
        return IngestJob(collection, file_id, filename, path, json.loads(attributes), chunk_tokens, overlap)

    def _require(self, connection: sqlite3.Connection, job: IngestJob) -> int:
        """`Collection.collection_id` of a job that waits. Raises JobWithdrawn."""
        row = connection.execute(_JOBS + _ONE, job.key).fetchone()
        if row is None or self._job(row) != job:
            raise JobWithdrawn(f"{job.file_id} is not to be ingested into {job.collection!r} (any more)")
        return int(row[0])


def _settle(
    connection: sqlite3.Connection, key: int, job: IngestJob, status: str, code: str | None, message: str | None
) -> None:
    connection.execute(
        "UPDATE collection_files SET status = ?, error_code = ?, error_message = ? "
        "WHERE collection = ? AND file_id = ?",
        (status, code, message, key, job.file_id),
    )


def _is_locked(descriptor: int) -> bool:
    """Takes the lock, unless another process has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
