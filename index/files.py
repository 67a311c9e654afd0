"""Uploaded files: the bytes in the data directory, the rows in the catalogue.

Knows nothing about what is in a file, nor of HTTP.

Invariants: a row exists only where all bytes are on the disk; a name that a client gave never becomes a path; a file is
gone from every collection in the transaction that removes its row. Somebody else's file is as unknown as none.
"""

from __future__ import annotations

import errno
import math
import os
import re
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from index.catalogue import Catalogue
from index.data_dir import DataDir, sync_folder
from index.errors import DataDirError, InvalidValue, NotFound, StorageFull
from index.library_types import StoredFile
from index.paging import Page, PageRequest, Place, made_at, new_id, read_page

MAX_FILENAME = 255  # characters
_PREFIX = "file-"
_ID = re.compile(_PREFIX + "[0-9a-f]{24}")
_ORPHAN_AGE_S = 3600  # no upload takes that long: bytes without a row that are older were left by a crash
_COLUMNS = "id, filename, purpose, num_bytes, created_at, expires_at"
_LIVE = "owner = ? AND (expires_at IS NULL OR expires_at > ?)"


class IncomingFile:
    """Bytes on their way in. `Files.keep` makes a file of them; `discard` removes what has not been kept."""

    def __init__(self, folder: Path) -> None:
        self.id = new_id(_PREFIX)
        self.num_bytes = 0
        self.path = folder / f"{self.id}.tmp"
        # `discard` may come while a write of a cancelled request is still under way in its thread
        self._lock = threading.Lock()
        with _disk_errors_named(folder):
            self._file = open(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")  # noqa: SIM115

    def write(self, data: bytes) -> None:
        """Raises StorageFull."""
        with self._lock, _disk_errors_named(self.path.parent):
            self._file.write(data)
            self.num_bytes += len(data)

    def seal(self) -> None:
        """Has everything written on the disk, and closes the file."""
        with self._lock, _disk_errors_named(self.path.parent):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def discard(self) -> None:
        with self._lock:
            with suppress(OSError):  # what was buffered finds no room; it is not wanted any more
                self._file.close()
            self.path.unlink(missing_ok=True)


class Files:
    """The uploaded files of all owners. Safe to use from many threads."""

    def __init__(self, catalogue: Catalogue, data_dir: DataDir, max_owner_bytes: int = 0) -> None:
        """max_owner_bytes: what the files of one owner may have together; 0: no limit."""
        self._catalogue, self._folder, self._max_owner_bytes = catalogue, data_dir.files, max_owner_bytes
        self._database = catalogue.database

    def begin(self) -> IncomingFile:
        """Raises StorageFull."""
        return IncomingFile(self._folder)

    def keep(
        self, upload: IncomingFile, owner: str, filename: str, purpose: str, expires_after_s: int | None = None
    ) -> StoredFile:
        """Makes a file of what was uploaded. Raises InvalidValue where it is empty or has no name, and StorageFull."""
        if upload.num_bytes == 0:
            raise InvalidValue("file", "is empty")
        name, created_at = _clean_name(filename), made_at(upload.id)
        expires_at = None if expires_after_s is None else created_at + expires_after_s
        upload.seal()
        path = self._folder / upload.id
        with _disk_errors_named(self._folder):
            os.rename(upload.path, path)
        try:
            with _disk_errors_named(self._folder):
                sync_folder(self._folder)
            stored = StoredFile(upload.id, name, purpose, upload.num_bytes, created_at, expires_at)
            with self._database.write() as connection:
                self._require_room(connection, owner, stored.num_bytes)
                connection.execute(
                    "INSERT INTO files (id, owner, filename, purpose, num_bytes, created_at, expires_at) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (stored.id, owner, name, purpose, stored.num_bytes, created_at, expires_at),
                )
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return stored

    def get(self, file_id: str, owner: str) -> StoredFile:
        """Raises NotFound."""
        with self._database.read() as connection:
            return _get(connection, file_id, owner)

    def page(self, owner: str, request: PageRequest, purpose: str | None = None) -> Page[StoredFile]:
        """The files of one owner, by the time of their upload."""
        select, values = f"SELECT {_COLUMNS} FROM files WHERE {_LIVE}", [owner, int(time.time())]
        if purpose is not None:
            select, values = f"{select} AND purpose = ?", [*values, purpose]
        with self._database.read() as connection:
            rows, has_more = read_page(connection, select, values, ("id",), request, place_of_file)
        return Page(tuple(StoredFile(*row) for row in rows), has_more)

    def open(self, file_id: str, owner: str) -> tuple[StoredFile, BinaryIO]:
        """The file and its bytes, to be closed by the caller; they can be read on when it is deleted meanwhile."""
        stored = self.get(file_id, owner)
        try:
            return stored, open(self._folder / stored.id, "rb")
        except FileNotFoundError:
            raise NotFound("file", file_id) from None  # deleted since

    def delete(self, file_id: str, owner: str) -> None:
        """Removes the file, and what was read from it in every collection. Raises NotFound."""
        with self._database.write() as connection:
            stored = _get(connection, file_id, owner)
            self._remove(connection, stored.id)
        (self._folder / stored.id).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Removes files that have expired, and bytes that a crash left without a row."""
        with self._database.write() as connection:
            expired = connection.execute("SELECT id FROM files WHERE expires_at <= ?", (int(time.time()),)).fetchall()
            for (file_id,) in expired:
                self._remove(connection, file_id)
        old = time.time() - _ORPHAN_AGE_S
        with os.scandir(self._folder) as entries:
            paths = [Path(entry) for entry in entries if _modified_at(entry) < old]
        with self._database.read() as connection:
            kept = {row[0] for row in connection.execute("SELECT id FROM files")}
        for path in [*(self._folder / file_id for (file_id,) in expired), *(p for p in paths if p.name not in kept)]:
            path.unlink(missing_ok=True)

    def _require_room(self, connection: sqlite3.Connection, owner: str, num_bytes: int) -> None:
        select = "SELECT coalesce(sum(num_bytes), 0) FROM files WHERE owner = ?"
        (kept,) = connection.execute(select, (owner,)).fetchone()
        if self._max_owner_bytes and kept + num_bytes > self._max_owner_bytes:
            raise StorageFull(
                f"your files take {kept} of the {self._max_owner_bytes} bytes that you may keep, and this one has "
                f"{num_bytes}; delete some and try again"
            )

    def _remove(self, connection: sqlite3.Connection, file_id: str) -> None:
        for (key,) in connection.execute("SELECT collection FROM collection_files WHERE file_id = ?", (file_id,)):
            self._catalogue.remove_documents(connection, key, *documents_of(file_id))
        connection.execute("DELETE FROM files WHERE id = ?", (file_id,))


def documents_of(file_id: str) -> tuple[str, str]:
    """The ids of the documents read from a file lie in this range [first, end)."""
    return file_id, f"{file_id}."  # '.' follows '-'


def place_of_file(file_id: str) -> Place:
    """Where a file stands in lists; see `read_page`."""
    if not _ID.fullmatch(file_id):
        raise ValueError("no id of a file")
    return (file_id,)


def _get(connection: sqlite3.Connection, file_id: str, owner: str) -> StoredFile:
    select = f"SELECT {_COLUMNS} FROM files WHERE id = ? AND {_LIVE}"
    row = connection.execute(select, (file_id, owner, int(time.time()))).fetchone()
    if row is None:
        raise NotFound("file", file_id)
    return StoredFile(*row)


def _clean_name(filename: str) -> str:
    """The last part of a path, as a name that can be shown anywhere."""
    name = re.split(r"[/\\]", filename)[-1]
    name = "".join(c for c in name if c.isprintable()).strip()
    if not name or len(name) > MAX_FILENAME:
        raise InvalidValue("file", f"must be sent with a file name of 1 to {MAX_FILENAME} characters")
    return name


def _modified_at(entry: os.DirEntry[str]) -> float:
    try:
        return entry.stat().st_mtime
    except FileNotFoundError:  # renamed or removed since
        return math.inf


@contextmanager
def _disk_errors_named(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFull("no space left for uploaded files; delete some and try again") from error
        raise DataDirError(f"{folder} cannot be written ({error.strerror}); check the disk and its rights") from error
