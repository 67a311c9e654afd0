"""One waiting file → its documents in the collection, or the reason why not, in its owner's words.

Knows nothing about processes: whoever calls holds the queue (`IngestQueue.working`).

Invariant: a message that an owner will read names the file as its owner does, never by its path in the data directory.
"""

from __future__ import annotations

import logging
import time
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Literal, TypeAlias

from index.config import ChunkingConfig
from index.errors import (
    CatalogueError,
    CollectionMismatch,
    CollectionNotFound,
    DocumentError,
    InvalidValue,
    JobWithdrawn,
    StorageFull,
    UnsupportedFormat,
)
from index.formats.parsed import clean
from index.ingest import Ingestor, ProgressCallback
from index.ingest_queue import IngestJob, IngestQueue
from index.library_types import IngestErrorCode
from index.types import IngestProgress

logger = logging.getLogger(__name__)
LOOK_EVERY_S = 1.0  # how often a job under way is checked to be wanted still
JobOutcome: TypeAlias = Literal["completed", "failed", "withdrawn", "waiting"]


def ingest_job(
    job: IngestJob,
    queue: IngestQueue,
    ingestor: Ingestor,
    progress: ProgressCallback,
    look_every_s: float = LOOK_EVERY_S,
) -> JobOutcome:
    """Ingests the file and settles its job. 'waiting': it was attached anew meanwhile and is to be done again.

    Whatever is wrong with the file, or with us, fails the job. Raises CatalogueError only where not even that can be
    written down (StorageFull) or the catalogue itself is at fault: the job waits on, and may be tried again later.
    """
    told = [IngestProgress(1, 0, 0, 0)]

    def tell(now: IngestProgress) -> None:
        told[0] = now
        progress(now)

    def on_wait() -> None:  # somebody else writes; that is no standstill
        progress(replace(told[0], stage="storing"))

    def writing() -> AbstractContextManager[None]:
        return queue.writing(on_wait)

    try:
        try:
            parts = replace(ingestor, chunking=_chunking(job, ingestor), guard=queue.guard(job), writing=writing)
            watched = _watched(job, queue, tell, look_every_s)
            document_ids = parts.add_upload(job.path, job.upload, job.attributes, job.collection, watched)
            with writing():
                return "completed" if queue.complete(job, document_ids) else "waiting"
        except (JobWithdrawn, CollectionNotFound):
            raise
        except Exception as error:
            if type(error) is CatalogueError:
                raise
            code, message = _verdict(job, error)
            if code == "server_error":
                logger.error("%s cannot be ingested", job.file_id, exc_info=error)
            with writing():
                queue.fail(job, code, message)
            return "failed"
    except (JobWithdrawn, CollectionNotFound):
        with writing():
            queue.clear(job)
        return "withdrawn"


def _watched(job: IngestJob, queue: IngestQueue, progress: ProgressCallback, look_every_s: float) -> ProgressCallback:
    """`progress`, but now and then it is looked whether the job is wanted still; raises JobWithdrawn if not."""
    next_look = time.monotonic() + look_every_s

    def tell(now: IngestProgress) -> None:
        nonlocal next_look
        progress(now)
        if time.monotonic() >= next_look:
            next_look = time.monotonic() + look_every_s
            if not queue.is_wanted(job):
                raise JobWithdrawn(job.file_id)

    return tell


def _chunking(job: IngestJob, ingestor: Ingestor) -> ChunkingConfig:
    if job.chunk_tokens is None:
        return ingestor.chunking
    return ChunkingConfig(job.chunk_tokens, job.chunk_overlap_tokens or 0)


def _verdict(job: IngestJob, error: Exception) -> tuple[IngestErrorCode, str]:
    """Whose fault it is, and what is wrong and how to mend it."""
    name = clean(job.filename)
    if isinstance(error, MemoryError) or isinstance(error.__cause__, MemoryError):
        return (
            "invalid_file",
            f"{name}: takes more memory than the server gives to one file; split it into smaller files",
        )
    if isinstance(error, DocumentError) and job.path.exists():
        code: IngestErrorCode = "unsupported_file" if isinstance(error, UnsupportedFormat) else "invalid_file"
        return code, f"{name}: {error.reason.replace(str(job.path), name)}"
    if isinstance(error, InvalidValue):
        return "invalid_file", f"{name}: {error}"
    if isinstance(error, StorageFull):
        return "server_error", f"{name}: the server has no space left to store it; free some, then attach it again"
    if isinstance(error, CollectionMismatch):
        return "server_error", f"{name}: {error}"
    reason = f"could not be ingested ({type(error).__name__}); the server's log has the details"
    return "server_error", f"{name}: {reason}"
