"""Vector stores and the files attached to them, in the form of OpenAI's API.

Extensions, all named `fusionrag`: on a vector store what it holds and which KV is stored for it, on an attached file
how far its ingest is while that runs.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Literal

from pydantic import BaseModel

from index.config import ChunkingConfig
from index.library_types import AttachedFile, CitedFile, FileBatch, FileCounts, FileStatus, VectorStore
from index.types import IngestProgress, ScoredChunk
from server.replies.paging import Identified


class FileCountsReply(BaseModel):
    in_progress: int
    completed: int
    failed: int
    cancelled: int
    total: int


class ExpiresAfter(BaseModel):
    anchor: Literal["last_active_at"] = "last_active_at"
    days: int


class KVReply(BaseModel):
    """Stored KV: numbers of objects, of which `stale` ones are to be computed anew, and their bytes."""

    raw: int
    fused: int
    stale: int
    bytes: int


class StoreDetails(BaseModel):
    num_chunks: int
    num_documents: int
    kv: KVReply


class VectorStoreObject(Identified):
    object: Literal["vector_store"] = "vector_store"
    created_at: int
    name: str
    description: str | None
    usage_bytes: int
    file_counts: FileCountsReply
    status: Literal["expired", "in_progress", "completed"]
    expires_after: ExpiresAfter | None
    expires_at: int | None
    last_active_at: int
    metadata: dict[str, str]
    fusionrag: StoreDetails


class VectorStoreDeleted(Identified):
    object: Literal["vector_store.deleted"] = "vector_store.deleted"
    deleted: Literal[True] = True


class LastError(BaseModel):
    code: Literal["server_error", "unsupported_file", "invalid_file"]
    message: str


class StaticSizes(BaseModel):
    max_chunk_size_tokens: int
    chunk_overlap_tokens: int


class StaticStrategy(BaseModel):
    type: Literal["static"] = "static"
    static: StaticSizes


class FileDetails(BaseModel):
    """How far an ingest is: `progress` is the part of the passages found so far that are embedded, from 0 to 1."""

    stage: str
    progress: float


class VectorStoreFile(Identified):
    object: Literal["vector_store.file"] = "vector_store.file"
    usage_bytes: int
    created_at: int
    vector_store_id: str
    status: FileStatus
    last_error: LastError | None
    chunking_strategy: StaticStrategy
    attributes: dict[str, str | bool | int | float]
    fusionrag: FileDetails | None


class VectorStoreFileDeleted(Identified):
    object: Literal["vector_store.file.deleted"] = "vector_store.file.deleted"
    deleted: Literal[True] = True


class TextPart(BaseModel):
    type: Literal["text"] = "text"
    text: str


class FileContent(BaseModel):
    """The passages that were read from a file, in order."""

    object: Literal["vector_store.file_content.page"] = "vector_store.file_content.page"
    data: list[TextPart]
    has_more: Literal[False] = False
    next_page: None = None


class FileBatchObject(Identified):
    object: Literal["vector_store.files_batch"] = "vector_store.files_batch"
    created_at: int
    vector_store_id: str
    status: FileStatus
    file_counts: FileCountsReply


class SearchResult(BaseModel):
    """One passage. A document of the command line has its own id for `file_id`, its source for `filename`.

    Extensions: `chunk_id`, and `title`, which a chat that sends the passage as one of its `documents` needs too for the
    passage's stored KV to be found.
    """

    file_id: str
    filename: str
    score: float
    attributes: dict[str, str | bool | int | float]
    content: list[TextPart]
    title: str
    chunk_id: str


class SearchResults(BaseModel):
    object: Literal["vector_store.search_results.page"] = "vector_store.search_results.page"
    search_query: list[str]
    data: list[SearchResult]
    has_more: Literal[False] = False
    next_page: None = None


def vector_store_object(store: VectorStore) -> VectorStoreObject:
    size, days = store.size, store.settings.expires_after_days
    kv = KVReply(raw=size.num_raw, fused=size.num_fused, stale=size.num_stale, bytes=size.kv_bytes)
    is_expired = store.is_expired(time.time())
    return VectorStoreObject(
        id=store.id,
        created_at=store.created_at,
        name=store.settings.title,
        description=store.settings.description or None,
        usage_bytes=store.passage_bytes + size.kv_bytes,
        file_counts=_counts_reply(store.file_counts),
        status="expired" if is_expired else "in_progress" if store.file_counts.in_progress else "completed",
        expires_after=None if days is None else ExpiresAfter(days=days),
        expires_at=store.expires_at,
        last_active_at=store.last_active_at,
        metadata=dict(store.settings.metadata),
        fusionrag=StoreDetails(num_chunks=size.num_chunks, num_documents=size.num_documents, kv=kv),
    )


def vector_store_file(file: AttachedFile, chunking: ChunkingConfig, progress: IngestProgress | None) -> VectorStoreFile:
    """chunking: that of files whose own is not given; progress: of the file, where it is being ingested now."""
    error, details = None, None
    if file.error_code is not None:
        error = LastError(code=file.error_code, message=file.error_message or "")
    if file.status == "in_progress" and progress is not None:
        part = progress.num_chunks / progress.num_chunks_cut if progress.num_chunks_cut else 0.0
        details = FileDetails(stage=progress.stage, progress=min(1.0, part))
    sizes = StaticSizes(
        max_chunk_size_tokens=file.chunk_tokens or chunking.chunk_tokens,
        chunk_overlap_tokens=chunking.chunk_overlap_tokens
        if file.chunk_overlap_tokens is None
        else file.chunk_overlap_tokens,
    )
    return VectorStoreFile(
        id=file.file_id,
        usage_bytes=file.passage_bytes,
        created_at=file.created_at,
        vector_store_id=file.collection,
        status=file.status,
        last_error=error,
        chunking_strategy=StaticStrategy(static=sizes),
        attributes=dict(file.attributes),
        fusionrag=details,
    )


def file_batch_object(batch: FileBatch) -> FileBatchObject:
    return FileBatchObject(
        id=batch.id,
        created_at=batch.created_at,
        vector_store_id=batch.collection,
        status=batch.status,
        file_counts=_counts_reply(batch.file_counts),
    )


def file_content(texts: Iterable[str]) -> FileContent:
    return FileContent(data=[TextPart(text=text) for text in texts])


def search_results(
    queries: Sequence[str], hits: Iterable[ScoredChunk], files: Mapping[str, CitedFile]
) -> SearchResults:
    """files: of the hits' documents, by document id; hits of others have been removed since."""
    return SearchResults(
        search_query=list(queries),
        data=[
            SearchResult(
                file_id=files[hit.chunk.document_id].file_id,
                filename=files[hit.chunk.document_id].filename,
                score=hit.score,
                attributes=dict(files[hit.chunk.document_id].attributes),
                content=[TextPart(text=hit.chunk.text)],
                title=hit.chunk.title,
                chunk_id=hit.chunk.chunk_id,
            )
            for hit in hits
            if hit.chunk.document_id in files
        ],
    )


def _counts_reply(counts: FileCounts) -> FileCountsReply:
    return FileCountsReply(**asdict(counts), total=counts.total)
