"""Files → Documents: finds the files, picks the reader by extension, gives every document its id and title.

Knows nothing about chunks, vectors or collections.

Invariant: a document's id depends only on where it came from (resolved path, plus record id or place within a JSON or
JSONL file), so that a re-ingest finds the document it replaces. The ids of one file share the prefix `file_id`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from index.errors import DocumentError, UnsupportedFormat
from index.formats import READERS, Parsed
from index.formats.parsed import clean
from index.types import Document


@dataclass(frozen=True)
class FoundFiles:
    """What `find_files` found: files to read in sorted order, and files of unknown format that it left out."""

    files: tuple[Path, ...]
    unsupported: tuple[Path, ...]


def find_files(paths: Sequence[str | Path]) -> FoundFiles:
    """Files named by `paths`; directories are walked in sorted order, their hidden files and folders skipped.

    A file of unknown format is reported when found in a directory, but raises UnsupportedFormat when named itself. A
    path that does not exist raises DocumentError. A file reached twice is listed once.
    """
    files: dict[Path, Path] = {}
    unsupported: dict[Path, Path] = {}
    for path in map(Path, paths):
        if path.is_dir():
            for file in _walk(path):
                found = files if file.suffix.lower() in READERS else unsupported
                found.setdefault(file.resolve(), file)
        else:
            _require_supported(path)
            files.setdefault(path.resolve(), path)
    return FoundFiles(tuple(files.values()), tuple(unsupported.values()))


def read_documents(path: str | Path, source: str | None = None) -> Iterator[Document]:
    """The documents of one file, as a stream: one, or one per record of a JSON or JSONL file.

    source: what the file is called in citations and in the document's id, when that is not its path (an upload).
    Raises DocumentError (while iterating) with the remedy where the file is unreadable, empty or not what its
    extension says; documents before the fault have been yielded by then.
    """
    path = Path(path)
    _require_supported(path)
    prefix, name = file_id(path, source), clean(source or path.as_posix())
    is_empty = True
    try:
        if path.stat().st_size == 0:
            raise DocumentError(path, "is empty; remove it from the list or fill it")
        for parsed in READERS[path.suffix.lower()](path):
            if parsed.sections:
                yield _document(parsed, prefix, name)
                is_empty = False
    except OSError as error:
        raise DocumentError(
            path, f"cannot be read ({error.strerror or error}); check the path and its rights"
        ) from error
    if is_empty:
        raise DocumentError(path, "holds no text; remove it from the list or fill it")


def file_id(path: str | Path, source: str | None = None) -> str:
    """The id of the one document of a file, and the prefix (before '-') of the ids of a file's records."""
    return hashlib.sha256((source or str(Path(path).resolve())).encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _document(parsed: Parsed, prefix: str, source: str) -> Document:
    first_heading = next((s.heading for s in parsed.sections if s.heading), "")
    title = parsed.title if parsed.title is not None else first_heading or Path(source).stem
    if parsed.record:
        key = hashlib.sha256(parsed.record.encode()).hexdigest()[:16]
        prefix, source = f"{prefix}-{key}", f"{source}#{parsed.record}"
    return Document(prefix, title, parsed.sections, source, parsed.metadata)


def _require_supported(path: Path) -> None:
    if not path.exists():
        raise DocumentError(path, "no such file or directory")
    if path.suffix.lower() not in READERS:
        kind = f"extension {path.suffix!r}" if path.suffix else "a name without extension"
        raise UnsupportedFormat(path, f"{kind} is not supported; supported are {' '.join(READERS)}")


def _walk(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for name in sorted(n for n in names if not n.startswith(".")):
            file = Path(folder, name)
            if file.is_file():  # no sockets, pipes or dangling links
                yield file
