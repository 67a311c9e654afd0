"""Files → Documents: finds the files, picks the reader by extension, gives every document its id and title.

Knows nothing about chunks, vectors or collections.

Invariant: a document's id depends only on where it came from (resolved path or id of the upload, plus record id or
place within a JSON or JSONL file), so that a re-ingest finds the document it replaces. The ids of one file share a
prefix: `file_id`, or the upload's id.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from index.errors import DocumentError, UnsupportedFormat
from index.formats import READERS, Parsed, Reader
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
            _require_supported(path, path.name)
            files.setdefault(path.resolve(), path)
    return FoundFiles(tuple(files.values()), tuple(unsupported.values()))


@dataclass(frozen=True)
class UploadedAs:
    """How a file is known that does not lie under its own name: by its id, and by what its owner calls it."""

    file_id: str
    filename: str


def read_documents(path: str | Path, upload: UploadedAs | None = None) -> Iterator[Document]:
    """The documents of one file, as a stream: one, or one per record of a JSON or JSONL file.

    upload: its id begins the documents' ids; its name decides the format and is what citations show.
    Raises DocumentError (while iterating) with the remedy where the file is unreadable, empty or not what its
    extension says; documents before the fault have been yielded by then.
    """
    path = Path(path)
    name = clean(upload.filename if upload else path.as_posix())
    prefix = upload.file_id if upload else file_id(path)
    reader = _require_supported(path, name)
    is_empty = True
    try:
        if path.stat().st_size == 0:
            raise DocumentError(path, "is empty; remove it from the list or fill it")
        for parsed in reader(path):
            if parsed.sections:
                yield _document(parsed, prefix, name)
                is_empty = False
    except OSError as error:
        raise DocumentError(
            path, f"cannot be read ({error.strerror or error}); check the path and its rights"
        ) from error
    if is_empty:
        raise DocumentError(path, "holds no text; remove it from the list or fill it")


def file_id(path: str | Path) -> str:
    """The id of the one document of a file, and the prefix (before '-') of the ids of a file's records."""
    return hashlib.sha256(str(Path(path).resolve()).encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _document(parsed: Parsed, prefix: str, source: str) -> Document:
    first_heading = next((s.heading for s in parsed.sections if s.heading), "")
    title = parsed.title if parsed.title is not None else first_heading or Path(source).stem
    if parsed.record:
        key = hashlib.sha256(parsed.record.encode()).hexdigest()[:16]
        prefix, source = f"{prefix}-{key}", f"{source}#{parsed.record}"
    return Document(prefix, title, parsed.sections, source, parsed.metadata)


def _require_supported(path: Path, name: str) -> Reader:
    if not path.exists():
        raise DocumentError(path, "no such file or directory")
    suffix = Path(name).suffix
    if suffix.lower() not in READERS:
        kind = f"extension {suffix!r}" if suffix else "a name without extension"
        raise UnsupportedFormat(path, f"{kind} is not supported; supported are {' '.join(READERS)}")
    return READERS[suffix.lower()]


def _walk(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for name in sorted(n for n in names if not n.startswith(".")):
            file = Path(folder, name)
            if file.is_file():  # no sockets, pipes or dangling links
                yield file
