"""The exceptions of `index`, and the root that every package of the project shares. One tree:

    FusionRAGError                  root; fusionrag/errors.py adds its own branches
    ├── InvalidValue                a knob or argument has a value it cannot have; names the field (also a ValueError)
    ├── DocumentError               a file cannot be read as documents; names the path
    │   └── UnsupportedFormat       no reader for this file extension
    ├── CatalogueError              the catalogue cannot be read or written
    │   ├── CatalogueVersionError   it was made by another version of the schema
    │   ├── StorageFull             no space left; what was committed before is intact
    │   ├── CollectionNotFound      no collection of this name
    │   └── CollectionMismatch      the collection was made with another encoder or embedding model
    ├── NotFound                    no such thing under this id, or none that the asker may see; names kind and id
    ├── Conflict                    a change that the present state does not allow; try again later or differently
    ├── JobWithdrawn                a file that was being ingested is not wanted any more, or not in this way
    ├── DataDirError                the data directory cannot be used
    │   └── DataDirLocked           another process holds it; names the process
    ├── EmbeddingModelError         the embedding model cannot be loaded or used
    └── RerankModelError            the re-ranking model cannot be loaded or used

Knows nothing about what raises them. Every message says what is wrong, where, and what to do about it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

__all__ = [
    "CatalogueError",
    "CatalogueVersionError",
    "CollectionMismatch",
    "CollectionNotFound",
    "Conflict",
    "DataDirError",
    "DataDirLocked",
    "DocumentError",
    "EmbeddingModelError",
    "FusionRAGError",
    "InvalidValue",
    "JobWithdrawn",
    "NotFound",
    "RerankModelError",
    "StorageFull",
    "UnsupportedFormat",
]


class FusionRAGError(Exception):
    """Root of all errors that the project raises on purpose."""


class InvalidValue(FusionRAGError, ValueError):
    """A knob or argument has a value it cannot have. `field` is its name."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


class DocumentError(FusionRAGError):
    """A file cannot be read as documents. `path` is the file, `reason` says why and what to do."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = Path(path)
        self.reason = reason


class UnsupportedFormat(DocumentError):
    """No reader for this file extension."""


class CatalogueError(FusionRAGError):
    """The catalogue cannot be read or written."""


class CatalogueVersionError(CatalogueError):
    """The catalogue was made by another version of the schema."""


class StorageFull(CatalogueError):
    """No space left on the device. Everything committed before is intact."""


class CollectionNotFound(CatalogueError):
    """No collection of this name. `name` is the name asked for."""

    def __init__(self, name: str, known: Iterable[str] = ()) -> None:
        names = ", ".join(known) or "none"
        super().__init__(
            f"collection {name!r} does not exist (existing: {names}); "
            f"`fusionrag ingest PATH --collection {name}` makes it"
        )
        self.name = name


class NotFound(FusionRAGError):
    """No such thing under this id, or none that the asker may see: the two cannot be told apart."""

    def __init__(self, kind: str, id: str) -> None:
        super().__init__(f"No {kind} found with id {id!r}.")
        self.kind, self.id = kind, id


class Conflict(FusionRAGError):
    """The present state does not allow the change."""


class JobWithdrawn(FusionRAGError):
    """A file was detached, deleted, cancelled or attached anew with other settings while it was being ingested."""


class CollectionMismatch(CatalogueError):
    """The collection was made with another encoder or embedding model than the one in use."""

    def __init__(self, name: str, what: str, stored: str, current: str) -> None:
        super().__init__(
            f"collection {name!r} was made with {what} {stored!r} but {current!r} is in use; "
            f"use the {what} of the collection, or ingest the documents into a new collection"
        )
        self.name, self.stored, self.current = name, stored, current


class DataDirError(FusionRAGError):
    """The data directory cannot be used."""


class DataDirLocked(DataDirError):
    """Another process holds the data directory. `holders` are its (or their) `pid command` lines."""

    def __init__(self, path: Path, holders: tuple[str, ...]) -> None:
        by = "; ".join(f"pid {holder}" for holder in holders) or "another process"
        super().__init__(f"{path} is in use by {by}; wait until it ends, stop it, or name another data directory")
        self.path, self.holders = path, holders


class EmbeddingModelError(FusionRAGError):
    """The embedding model cannot be loaded or used."""


class RerankModelError(FusionRAGError):
    """The re-ranking model cannot be loaded or used."""
