"""The data directory: where the catalogue, the KV objects and the vector indexes lie, and who may write them.

Knows nothing about what is in those files.

Invariant: at most one process holds the exclusive lock, and none holds it beside a shared one. The lock is the
operating system's, so that it ends with its process, however that dies.
"""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from index.errors import DataDirError, DataDirLocked


class DataDir:
    """Paths within one data directory. Made (readable by its owner only) where it does not exist."""

    def __init__(self, path: str | Path) -> None:
        """Raises DataDirError where the directory cannot be made."""
        self.path = Path(path)
        try:
            for folder in (self.path, self.kv, self.faiss, self.files):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise DataDirError(
                f"{self.path} cannot be used as data directory ({error.strerror}); check the path and its rights"
            ) from error

    @property
    def catalogue(self) -> Path:
        return self.path / "catalogue.sqlite"

    @property
    def kv(self) -> Path:
        """The folder of the KV objects."""
        return self.path / "kv"

    @property
    def faiss(self) -> Path:
        """The folder of the vector indexes."""
        return self.path / "faiss"

    @property
    def files(self) -> Path:
        """The folder of the uploaded files, each under its id."""
        return self.path / "files"

    def index_file(self, collection: str) -> Path:
        """The saved vector index of a collection. It can be rebuilt from the catalogue, so it may always be removed."""
        return self.faiss / f"{collection}.faiss"

    @contextmanager
    def lock(self, exclusive: bool) -> Iterator[None]:
        """Holds the directory: exclusively to change documents, shared to add KV beside other such workers.

        Does not wait: raises DataDirLocked, which names the holders, where another process is in the way.
        """
        descriptor = self._locked_file(exclusive)
        try:
            yield
        finally:
            os.close(descriptor)

    def _locked_file(self, exclusive: bool) -> int:
        path = self.path / "lock"
        descriptor = -1
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            fcntl.flock(descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            if exclusive:
                os.ftruncate(descriptor, 0)  # nobody else holds it: lines of earlier holders are out of date
            os.write(descriptor, f"{os.getpid()} {_command()}\n".encode("utf-8", "replace"))
        except OSError as error:
            if descriptor >= 0:
                os.close(descriptor)
            if isinstance(error, BlockingIOError):
                raise DataDirLocked(self.path, _live_holders(path)) from error
            raise DataDirError(f"{path} cannot be locked ({error.strerror}); check the disk and its rights") from error
        return descriptor


def sync_folder(folder: Path) -> None:
    """Has the names in a folder on the disk: those of files made, renamed or removed before."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _command() -> str:
    """Program and subcommand of this process. The other arguments stay out: they may hold secrets."""
    program, *arguments = sys.argv or ["python"]
    subcommand = next((a for a in arguments[:1] if not a.startswith("-")), "")
    return f"{Path(program).name or 'python'} {subcommand}".strip()


def _live_holders(path: Path) -> tuple[str, ...]:
    """The lines of processes that still run; the file keeps those of shared holders that have ended."""
    lines = dict.fromkeys(path.read_text(errors="replace").splitlines())
    return tuple(line for line in lines if _is_running(line.partition(" ")[0]))


def _is_running(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except PermissionError:
        return True  # it runs as another user
    except (ValueError, OSError):
        return False
    return True
