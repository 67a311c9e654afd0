"""Files → catalogue: reads, cuts, embeds and stores, and skips what has not changed.

Knows nothing about formats, token counts, models or the vector index, which follows the catalogue by itself.

Invariants: a document is stored in one transaction or not at all, so that whatever ends an ingest, running it again
goes on where it stopped; memory is bounded by one batch of chunks (or one document, if that is longer).
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from index.catalogue import Catalogue
from index.chunking import chunk_document
from index.config import ChunkingConfig
from index.documents import UploadedAs, file_id, find_files, read_documents
from index.errors import DocumentError
from index.types import (
    Chunk,
    ChunkEncoder,
    Document,
    FloatArray,
    IngestFailure,
    IngestProgress,
    IngestReport,
    IngestStage,
    TextEmbedder,
)

BATCH_CHUNKS = 512  # embedded together, over document borders: texts of like length then share a forward pass

ProgressCallback = Callable[[IngestProgress], None]


@dataclass(frozen=True)
class Ingestor:
    """What it takes to add documents to collections. The encoder's and embedder's marks must match the collection's."""

    catalogue: Catalogue
    encoder: ChunkEncoder
    embedder: TextEmbedder
    chunking: ChunkingConfig = field(default_factory=ChunkingConfig)
    guard: Callable[[sqlite3.Connection], None] | None = None  # see `Catalogue.replace_document`
    writing: Callable[[], AbstractContextManager[None]] = nullcontext  # held while a batch is stored
    batch_chunks: int = BATCH_CHUNKS

    def add_files(
        self, paths: Sequence[str | Path], collection: str, progress: ProgressCallback | None = None
    ) -> IngestReport:
        """Brings the collection up to date with the files; see `ingest`."""
        found = find_files(paths)
        self._open(collection)
        run = _Run(self, collection, IngestProgress(len(found.files), 0, 0, 0), progress)
        for path in found.files:
            run.add_file(path)
        run.flush()
        return replace(run.report, unsupported=tuple(str(path) for path in found.unsupported))

    def add_documents(self, documents: Iterable[Document], collection: str) -> IngestReport:
        """Adds or replaces the documents; others of the collection stay."""
        self._open(collection)
        run = _Run(self, collection, IngestProgress(0, 0, 0, 0), None)
        for document in documents:
            run.add(document)
        run.flush()
        return run.report

    def add_upload(
        self,
        path: Path,
        upload: UploadedAs,
        attributes: Mapping[str, str | int | float | bool],
        collection: str,
        progress: ProgressCallback | None = None,
    ) -> set[str]:
        """Adds or replaces the documents of an uploaded file, `attributes` laid over their metadata; returns their ids.

        Documents that the file does not hold any more stay: to remove them is part of completing it. Raises
        CollectionNotFound (a collection that was deleted is not made again), DocumentError and what `guard` raises;
        documents before the fault may have been stored.
        """
        self._open(collection, create=False)
        run = _Run(self, collection, IngestProgress(1, 0, 0, 0), progress)
        seen: set[str] = set()
        for document in read_documents(path, upload):
            seen.add(document.document_id)
            run.add(replace(document, metadata={**document.metadata, **attributes}))
        run.flush()
        return seen

    def _open(self, collection: str, create: bool = True) -> None:
        embedder = self.embedder
        self.catalogue.open_collection(collection, self.encoder.fingerprint, embedder.fingerprint, embedder.dim, create)


def ingest(
    paths: Sequence[str | Path],
    collection: str,
    catalogue: Catalogue,
    encoder: ChunkEncoder,
    embedder: TextEmbedder,
    chunking: ChunkingConfig | None = None,
    progress: ProgressCallback | None = None,
) -> IngestReport:
    """Brings the collection (made if absent) up to date with the files and directories named.

    Unchanged documents are skipped, changed ones replaced, and records that have left their JSON or JSONL file removed;
    documents of files that are not named stay. A file that cannot be read goes to `report.failed`, the others go on.
    Raises DocumentError for a path that does not exist, UnsupportedFormat for a named file of unknown format,
    CollectionMismatch, and StorageFull on a full disk (documents stored before it are kept).
    """
    return Ingestor(catalogue, encoder, embedder, chunking or ChunkingConfig()).add_files(paths, collection, progress)


class _Run:
    """One ingest under way: documents that are cut but not stored yet, and the report so far."""

    def __init__(
        self, ingestor: Ingestor, collection: str, progress: IngestProgress, callback: ProgressCallback | None
    ) -> None:
        self.parts, self.collection, self.progress, self.callback = ingestor, collection, progress, callback
        self.report = IngestReport()
        self.pending: list[tuple[Document, list[Chunk]]] = []

    def add_file(self, path: Path) -> None:
        seen: set[str] = set()
        try:
            for document in read_documents(path):
                seen.add(document.document_id)
                self.add(document)
        except DocumentError as error:
            self.report = replace(self.report, failed=(*self.report.failed, IngestFailure(str(path), error.reason)))
        else:
            self._remove_all_but(seen, file_id(path))
        self._advance(num_files_read=self.progress.num_files_read + 1)

    def add(self, document: Document) -> None:
        """Cuts the document, unless it is stored already; stores the batch once that is full."""
        self._advance("chunking", num_documents=self.progress.num_documents + 1)
        stored = self.parts.catalogue.document_hash(self.collection, document.document_id)
        if stored == ingest_hash(document, self.parts.chunking):
            self._count(num_unchanged=1)
            return
        self._count(num_added=int(stored is None), num_changed=int(stored is not None))
        chunks = chunk_document(document, self.parts.encoder, self.parts.chunking)
        self.pending.append((document, chunks))
        self._advance("parsing", num_chunks_cut=self.progress.num_chunks_cut + len(chunks))
        if sum(len(chunks) for _, chunks in self.pending) >= self.parts.batch_chunks:
            self.flush()

    def flush(self) -> None:
        """Embeds all pending chunks and stores their documents, one transaction each."""
        texts = [embedding_text(chunk) for _, chunks in self.pending for chunk in chunks]
        before = self.progress.num_chunks
        vectors = self.parts.embedder.embed(texts, lambda done: self._advance("embedding", num_chunks=before + done))
        self._advance("storing")
        with self.parts.writing():
            self._store(vectors)
        self._count(num_chunks=len(texts))
        self.pending = []
        self._advance("parsing")

    def _store(self, vectors: FloatArray) -> None:
        start = 0
        for document, chunks in self.pending:
            stop = start + len(chunks)
            self.parts.catalogue.replace_document(
                self.collection,
                document,
                chunks,
                vectors[start:stop],
                ingest_hash(document, self.parts.chunking),
                self.parts.guard,
            )
            start = stop

    def _remove_all_but(self, seen: set[str], prefix: str) -> None:
        """Removes the documents of a file whose records are not in it any more."""
        gone = self.parts.catalogue.document_ids(self.collection, prefix) - seen
        for document_id in sorted(gone):
            self.parts.catalogue.delete_document(self.collection, document_id)
        self._count(num_removed=len(gone))

    def _count(self, **increments: int) -> None:
        self.report = replace(self.report, **{k: getattr(self.report, k) + n for k, n in increments.items()})

    def _advance(self, stage: IngestStage | None = None, **values: int) -> None:
        self.progress = replace(self.progress, stage=stage or self.progress.stage, **values)
        if self.callback is not None:
            self.callback(self.progress)


def embedding_text(chunk: Chunk) -> str:
    """What is embedded for a chunk: its title is part of what it is about."""
    return f"{chunk.title}. {chunk.text}" if chunk.title else chunk.text


def ingest_hash(document: Document, chunking: ChunkingConfig) -> str:
    """Hex SHA-256 of all that decides what is stored for a document: content, metadata and the chunking knobs."""
    parts = [document.content_hash, dict(document.metadata), asdict(chunking)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
