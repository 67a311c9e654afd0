"""Stored KV on disk: one file per object, named by its digest.

    root/objects/<first two hex digits>/<digest>.safetensors
    root/quarantine/<digest>.safetensors                      objects that failed a check, kept for inspection

Knows nothing of what a KV means or of other tiers. Invariants: a name under objects/ appears only when all of its bytes
are on disk (temporary file in the same folder, fsync, rename, fsync of the folder), so a process killed at any moment
leaves a whole object or none; and no KV leaves `get` whose file is not, byte for byte, what was written for that spec.
Several processes may share a root.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal

import torch

from fusionrag.errors import StoreError
from fusionrag.store.base import BadObject, StoredHit, StoreStats
from fusionrag.store.stored_object import StoredObject, spec_fields
from fusionrag.types import ChunkKV, KVSource, KVSpec
from index.data_dir import sync_folder

PutStep = Literal["created", "written", "synced", "renamed", "durable"]

STALE_TEMPORARY_S = 3600.0  # no writer is this slow: what is older was left by one that died

_SUFFIX = ".safetensors"
_DIGEST = re.compile(r"[0-9a-f]{64}")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)

logger = logging.getLogger(__name__)


def _no_step(step: PutStep) -> None:
    pass


def pageable(num_bytes: int) -> torch.Tensor:
    """uint8 (num_bytes,) of ordinary memory."""
    return torch.empty(num_bytes, dtype=torch.uint8)


class DiskStore:
    """A KVStore (see `base`). Raises StoreError when `root` cannot be made or written.

    `on_step` is called after each step of a put, in the order of `PutStep` ("written" once per piece): tests end the
    process there.
    """

    def __init__(
        self, root: str | Path, verify_checksum: bool = True, on_step: Callable[[PutStep], None] = _no_step
    ) -> None:
        self._objects = Path(root) / "objects"
        self._quarantine = Path(root) / "quarantine"
        self._verify_checksum = verify_checksum
        self._on_step = on_step
        self._lock = threading.Lock()  # guards the two below
        self._stats = StoreStats()
        self._durable_folders: set[Path] = set()
        try:
            self._objects.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._quarantine.mkdir(mode=0o700, exist_ok=True)
            self._sweep()
        except OSError as error:
            raise _store_error("open", Path(root), error) from error

    @property
    def stats(self) -> StoreStats:
        return self._stats

    def get(self, spec: KVSpec, allocate: Callable[[int], torch.Tensor] = pageable) -> StoredHit | None:
        """One read of the whole file into what `allocate(num_bytes)` gives, uint8; the payload's tensors are views."""
        path = self._path(spec.digest)
        try:
            data = _read(path, allocate)
            payload = StoredObject.parsed(data, spec, self._verify_checksum).payload
        except FileNotFoundError:
            self._count(misses=1)
            return None
        except BadObject as error:
            self._set_aside(path, str(error))
            return None
        except OSError as error:  # no permission, too many open files: the object may be good, so it stays
            logger.warning("KV object %s cannot be read, its chunk is computed instead: %s", path, error)
            self._count(misses=1)
            return None
        self._count(hits_disk=1, bytes_read=len(data))
        return StoredHit(payload, KVSource.DISK)

    def recall(self, spec: KVSpec) -> StoredHit | None:  # noqa: ARG002 - nothing is in memory
        return None

    def put(self, spec: KVSpec, kv: ChunkKV) -> None:
        self.put_object(StoredObject.encoded(spec, kv))

    def put_object(self, stored: StoredObject) -> None:
        """`put` of what is already encoded."""
        path = self._path(stored.spec.digest)
        try:
            self._make_folder(path.parent)
            if path.exists():
                sync_folder(path.parent)  # its writer may not have come that far
            else:
                self._write(path, stored.serialized())
        except OSError as error:
            raise _store_error("write", path, error) from error

    def contains(self, spec: KVSpec) -> bool:
        return os.path.exists(self._path(spec.digest))  # not Path.exists, which may raise

    def delete(self, digest: str) -> int:
        """Also removes a quarantined copy: what a user deletes is gone. Raises StoreError if it cannot be removed."""
        path = self._path(digest)
        num_bytes = 0
        for copy in (path, self._quarantine / path.name):
            try:
                size = copy.stat().st_size
                copy.unlink()
                sync_folder(copy.parent)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise _store_error("delete", copy, error) from error
            num_bytes += size
        return num_bytes

    def written_for(self, digest: str) -> dict[str, object] | None:
        """The fields of the spec that an object's header names, or None where there is no readable object."""
        try:
            with open(self._path(digest), "rb") as file:
                return spec_fields(file)
        except (OSError, BadObject):
            return None

    def is_set_aside(self, digest: str) -> bool:
        """Whether an object of this name was found damaged."""
        return os.path.exists(self._quarantine / self._path(digest).name)

    def digests(self) -> Iterator[str]:
        for path in sorted(self._objects.glob(f"*/*{_SUFFIX}")):
            if _DIGEST.fullmatch(path.stem):
                yield path.stem

    def _path(self, digest: str) -> Path:
        if not _DIGEST.fullmatch(digest):
            raise StoreError(f"digest: {digest!r} is not the name of an object (64 hex digits)")
        return self._objects / digest[:2] / f"{digest}{_SUFFIX}"

    def _count(self, **counts: int) -> None:
        with self._lock:
            self._stats = self._stats.plus(**counts)

    def _make_folder(self, folder: Path) -> None:
        """Makes sure that the folder's own name is on disk: another process may have made it a moment ago."""
        with self._lock:
            if folder in self._durable_folders:
                return
            folder.mkdir(mode=0o700, exist_ok=True)
            sync_folder(self._objects)
            self._durable_folders.add(folder)

    def _write(self, path: Path, pieces: list[memoryview]) -> None:
        descriptor, name = tempfile.mkstemp(prefix=f"{path.stem[:16]}-", suffix=".tmp", dir=path.parent)  # mode 0600
        try:
            with open(descriptor, "wb") as file:
                self._on_step("created")
                for piece in pieces:
                    file.write(piece)
                    self._on_step("written")
                file.flush()
                os.fsync(descriptor)
                self._on_step("synced")
            os.replace(name, path)
            self._on_step("renamed")
            sync_folder(path.parent)
            self._on_step("durable")
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        self._count(bytes_written=sum(len(piece) for piece in pieces))

    def _set_aside(self, path: Path, reason: str) -> None:
        """Moves a bad object out of the way, so that it is computed and written again."""
        self._count(misses=1)
        logger.warning("KV object %s is bad and is moved to %s: %s", path, self._quarantine, reason)
        try:
            os.replace(path, self._quarantine / path.name)
        except FileNotFoundError:  # another reader was faster
            return
        except OSError as error:
            logger.warning("KV object %s could not be moved, delete it by hand: %s", path, error)
            return
        self._count(quarantined=1)

    def _sweep(self) -> None:
        """Removes what writers that died have left. Young files may belong to a process at work."""
        oldest = time.time() - STALE_TEMPORARY_S
        for temporary in self._objects.glob("*/*.tmp"):
            with suppress(FileNotFoundError):
                if temporary.stat().st_mtime < oldest:
                    temporary.unlink()


def _read(path: Path, allocate: Callable[[int], torch.Tensor]) -> torch.Tensor:
    """All bytes of a file, uint8 (n,), in one read into memory that nothing else owns."""
    try:
        with open(path, "rb", buffering=0) as file:
            data = allocate(os.fstat(file.fileno()).st_size)
            rest = data.numpy().data
            while rest and (num_read := file.readinto(rest)):  # the kernel gives at most 2 GiB at a time
                rest = rest[num_read:]
    except OSError as error:
        if error.errno == errno.EIO:
            raise BadObject(f"the disk cannot read it: {error}") from error
        raise
    if rest:
        raise BadObject("it became shorter while it was read")
    return data


def _store_error(action: str, path: Path, error: OSError) -> StoreError:
    if error.errno in _FULL:
        remedy = "free space or move the data directory to a larger disk; what was stored before is intact"
    elif error.errno in _FORBIDDEN:
        remedy = "give this user write permission, or name another data directory"
    else:
        remedy = "check the data directory"
    return StoreError(f"cannot {action} {path}: {error.strerror or error}; {remedy}")
