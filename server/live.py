"""Collections that change while the server runs: uploaded files, vector stores, and what makes them searchable.

Knows nothing of HTTP.

Invariant: between its start and its end, files that have expired are removed at most `SWEEP_INTERVAL_S` late.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from index.config import ChunkingConfig
from index.errors import FusionRAGError
from index.library import Library
from index.library_types import MadeWith

if TYPE_CHECKING:
    from index.retrieval import Retriever
    from server.ingestion import Ingestion
    from server.worker import Background

logger = logging.getLogger(__name__)
SWEEP_INTERVAL_S = 60.0


@dataclass(frozen=True)
class LiveCollections:
    """What the routes of files and vector stores need."""

    library: Library
    ingestion: Ingestion
    retriever: Retriever
    made_with: MadeWith  # the encoder and embedding model of collections that are made here
    chunking: ChunkingConfig  # of files whose own chunk sizes are not given
    background: Background | None = None  # computes the KV of what has become searchable

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Ingests what waits, and clears away what has expired, until it is left."""
        self.ingestion.start()
        sweeping = asyncio.create_task(self._sweep_regularly())
        try:
            yield
        finally:
            sweeping.cancel()
            await asyncio.gather(sweeping, self.ingestion.stop(), return_exceptions=True)

    async def _sweep_regularly(self) -> None:
        while True:
            try:
                await asyncio.to_thread(self.library.sweep)
            except (FusionRAGError, OSError) as error:  # a full disk, a busy catalogue: the next time, then
                logger.warning("expired files could not be cleared away: %s", error)
            await asyncio.sleep(SWEEP_INTERVAL_S)
