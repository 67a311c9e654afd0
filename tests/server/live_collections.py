"""Real collections for the real app: a catalogue, a library, a retriever and the real ingest jobs, in a thread.

Words are tokens and texts that share words are near each other, so that no model is needed.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from index import Catalogue, ChunkingConfig, DataDir, Ingestor, Retriever
from index.ingest_job import ingest_job
from index.ingest_queue import IngestQueue
from index.library import Library
from index.library_types import MadeWith
from index.types import IngestProgress
from server.live import LiveCollections
from tests.index.conftest import HashingEmbedder, WordEncoder

MADE_WITH = MadeWith(WordEncoder.fingerprint, HashingEmbedder.fingerprint, HashingEmbedder.dim)
CHUNKING = ChunkingConfig(64, 8)


class ThreadIngestion:
    """`server.ingestion.Ingestion` without a process. While `is_held`, files wait."""

    def __init__(self, queue: IngestQueue, ingestor: Ingestor) -> None:
        self._queue, self._ingestor = queue, ingestor
        self._woken, self._is_stopping = threading.Event(), False
        self._thread = threading.Thread(target=self._work)
        self._progress: dict[tuple[str, str], IngestProgress] = {}
        self.is_held = False
        self.outcomes = {"completed": 0, "failed": 0, "withdrawn": 0}
        self.num_restarts = 0

    def start(self) -> None:
        self._thread.start()
        self.wake()

    def wake(self) -> None:
        self._woken.set()

    @property
    def is_busy(self) -> bool:
        return self._woken.is_set()

    def progress(self, collection: str, file_id: str) -> IngestProgress | None:
        return self._progress.get((collection, file_id))

    def show(self, collection: str, file_id: str, progress: IngestProgress) -> None:
        """Says so of a file that waits, as if it were being worked on."""
        self._progress[collection, file_id] = progress

    async def stop(self) -> None:
        self._is_stopping = True
        self.wake()
        await asyncio.to_thread(self._thread.join)

    def _work(self) -> None:
        while self._woken.wait() and not self._is_stopping:
            self._woken.clear()
            while not self.is_held and (jobs := self._queue.waiting(1)):
                self.outcomes[ingest_job(jobs[0], self._queue, self._ingestor, lambda progress: None)] += 1


@dataclass(frozen=True)
class Opened:
    live: LiveCollections
    catalogue: Catalogue
    data_dir: DataDir
    ingestor: Ingestor

    @property
    def ingestion(self) -> ThreadIngestion:
        return self.live.ingestion


@contextmanager
def open_live(path: Path) -> Iterator[Opened]:
    """Live collections in a data directory. They serve one app, once."""
    data_dir, embedder = DataDir(path), HashingEmbedder()
    with Catalogue(data_dir.catalogue) as catalogue:
        ingestor = Ingestor(catalogue, WordEncoder(), embedder, CHUNKING)
        ingestion = ThreadIngestion(IngestQueue(catalogue, data_dir), ingestor)
        retriever = Retriever(catalogue, data_dir, embedder)
        live = LiveCollections(Library(catalogue, data_dir), ingestion, retriever, MADE_WITH, CHUNKING)
        yield Opened(live, catalogue, data_dir, ingestor)
