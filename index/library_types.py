"""The nouns of the library: uploaded files, vector stores, files attached to them, batches of those.

Knows nothing about how they are kept. Times are Unix times in seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from index.types import CollectionCounts

FileStatus = Literal["in_progress", "completed", "cancelled", "failed"]
IngestErrorCode = Literal["server_error", "unsupported_file", "invalid_file"]
Attributes: TypeAlias = Mapping[str, str | float | bool]

DAY_S = 86_400


@dataclass(frozen=True)
class StoredFile:
    """An uploaded file. `filename` is what the client called it; nothing on disk has that name."""

    id: str
    filename: str
    purpose: str
    num_bytes: int
    created_at: int
    expires_at: int | None = None  # from then on it is gone


@dataclass(frozen=True)
class MadeWith:
    """By what a collection's chunks were encoded and embedded."""

    encoder_fingerprint: str
    embedding_fingerprint: str
    dim: int


@dataclass(frozen=True)
class Attachment:
    """A file to attach. What is None stays as it is, or is the server's own."""

    file_id: str
    attributes: Attributes | None = None
    chunk_tokens: int | None = None
    chunk_overlap_tokens: int | None = None


@dataclass(frozen=True)
class VectorStoreSettings:
    """What the owner of a vector store decides about it."""

    title: str = ""
    description: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    expires_after_days: int | None = None  # counted from the last use; None: never


@dataclass(frozen=True)
class FileCounts:
    """How many attached files are in which state."""

    in_progress: int = 0
    completed: int = 0
    cancelled: int = 0
    failed: int = 0

    @property
    def total(self) -> int:
        return self.in_progress + self.completed + self.cancelled + self.failed


@dataclass(frozen=True)
class VectorStore:
    """A collection as API clients see it: its id is the collection's name."""

    id: str
    settings: VectorStoreSettings
    created_at: int
    last_active_at: int
    file_counts: FileCounts
    size: CollectionCounts
    passage_bytes: int  # texts, token ids and vectors

    @property
    def expires_at(self) -> int | None:
        days = self.settings.expires_after_days
        return None if days is None else self.last_active_at + days * DAY_S

    def is_expired(self, now: float) -> bool:
        return self.expires_at is not None and self.expires_at <= now


@dataclass(frozen=True)
class AttachedFile:
    """A file in a vector store. `completed` means searchable and answerable; its KV may still be computed."""

    file_id: str
    collection: str
    status: FileStatus
    error_code: IngestErrorCode | None
    error_message: str | None
    attributes: Attributes
    chunk_tokens: int | None
    chunk_overlap_tokens: int | None
    created_at: int
    passage_bytes: int  # texts, token ids and vectors of what was read from it


@dataclass(frozen=True)
class FileBatch:
    """Files that were attached together. A file that was attached anew since is counted there."""

    id: str
    collection: str
    created_at: int
    file_counts: FileCounts

    @property
    def status(self) -> FileStatus:
        counts = self.file_counts
        if counts.in_progress:
            return "in_progress"
        if counts.cancelled:
            return "cancelled"
        return "failed" if counts.failed and not counts.completed else "completed"


@dataclass(frozen=True)
class CitedFile:
    """How a document is shown in search results: an uploaded file, or one that was read by the command line."""

    file_id: str
    filename: str
    attributes: Mapping[str, str | int | float | bool]
