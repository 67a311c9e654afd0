"""Question → the nearest chunks of a collection.

Knows nothing about prompts or KV.

Invariant: an answer comes from a revision of the collection that was current when the search began, or a later one.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, field

from index.catalogue import Catalogue
from index.config import VectorIndexConfig
from index.data_dir import DataDir
from index.errors import CollectionMismatch, CollectionNotFound, InvalidValue
from index.types import Collection, FloatArray, ScoredChunk, TextEmbedder
from index.vector_index import VectorIndex, open_index, update_index


@dataclass
class _Live:
    """A collection's index in memory. The lock keeps updates and searches apart."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    index: VectorIndex | None = None
    collection: Collection | None = None  # as it was when the index was brought up to date


class Retriever:
    """Searches collections; keeps their indexes in memory and follows their changes. Safe to use from many threads."""

    def __init__(
        self,
        catalogue: Catalogue,
        data_dir: DataDir,
        embedder: TextEmbedder,
        config: VectorIndexConfig | None = None,
    ) -> None:
        self._catalogue, self._data_dir, self._embedder = catalogue, data_dir, embedder
        self._config = config or VectorIndexConfig()
        self._live: dict[str, _Live] = {}

    def search(
        self, collection: str, question: str, top_k: int, score_threshold: float | None = None
    ) -> list[ScoredChunk]:
        """At most `top_k` chunks with different ids and a score of at least `score_threshold`, highest score first.

        Raises CollectionNotFound, CollectionMismatch (made with another embedding model), or InvalidValue for an empty
        question or a `top_k` below 1. A collection without chunks gives an empty list.
        """
        if not question.strip():
            raise InvalidValue("question", "must not be empty")
        if top_k < 1:
            raise InvalidValue("top_k", f"must be at least 1, got {top_k}")
        current = self._current(collection)
        vector = self._embedder.embed_question(question)[None]  # [1, dim]
        limit, is_all = top_k, False
        hits: list[ScoredChunk] = []
        while len(hits) < top_k and not is_all:
            hits, is_all = self._nearest(current, vector, limit)
            limit *= 2  # documents that share chunks make hits fewer than rows: look further
        least = -math.inf if score_threshold is None else score_threshold
        return [hit for hit in hits[:top_k] if hit.score >= least]

    def refresh(self, collection: str) -> None:
        """Loads or updates the collection's index now, so that the next question does not wait for it."""
        current = self._current(collection)
        live = self._live_of(current)
        with live.lock:
            self._up_to_date(live, current)

    def _current(self, name: str) -> Collection:
        try:
            current = self._catalogue.collection(name)
        except CollectionNotFound:
            self._live.pop(name, None)
            raise
        if current.embedding_fingerprint != self._embedder.fingerprint:
            raise CollectionMismatch(name, "embedding model", current.embedding_fingerprint, self._embedder.fingerprint)
        return current

    def _nearest(self, current: Collection, vector: FloatArray, limit: int) -> tuple[list[ScoredChunk], bool]:
        """The chunks of the `limit` nearest rows, each id once, and whether there are no more rows than that."""
        live = self._live_of(current)
        with live.lock:
            scores, row_ids = self._up_to_date(live, current).search(vector, limit)
        found = {int(row): float(score) for row, score in zip(row_ids[0], scores[0], strict=True) if row >= 0}
        stored = self._catalogue.chunks_by_row(current.name, found)
        hits: dict[str, ScoredChunk] = {}
        for row, score in sorted(found.items(), key=lambda item: (-item[1], item[0])):
            if row in stored:  # else it was removed between the two look-ups
                hit = ScoredChunk(stored[row].chunk, min(1.0, max(-1.0, score)), stored[row].source)
                hits.setdefault(hit.chunk.chunk_id, hit)
        return list(hits.values()), len(found) < limit

    def _live_of(self, current: Collection) -> _Live:
        return self._live.setdefault(current.name, _Live())

    def _up_to_date(self, live: _Live, current: Collection) -> VectorIndex:
        """The index at the revision of `current` or a later one. The caller holds the lock."""
        index, held = live.index, live.collection
        if index is not None and held is not None and held.collection_id == current.collection_id:
            if held.revision >= current.revision:
                return index
            if update_index(index, self._catalogue, current.name):
                live.collection = current
                return index
        live.index, live.collection = open_index(self._catalogue, current.name, self._data_dir, self._config), current
        return live.index
