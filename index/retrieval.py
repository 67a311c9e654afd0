"""Question → the best chunks of one or more collections: by meaning (vectors), by words (BM25), or by both.

Knows nothing about prompts or KV. Stages: filter → dense and lexical rankings → fusion → leaving out near-duplicates →
re-ranking → threshold. Several collections are ranked as one, but that each counts its own words' rarity.

Invariants: an answer comes from a revision of the collection that was current when the search began, or a later one;
fewer than `top_k` chunks are found only where no more fit (lexical search: share a word with the question), but that an
approximate index may miss some where there is no filter.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np

from index.catalogue import Catalogue
from index.config import SearchConfig, VectorIndexConfig
from index.data_dir import DataDir
from index.duplicates import Kept
from index.errors import CollectionMismatch, CollectionNotFound, InvalidValue
from index.filters import Filter
from index.fusion import Ranking, fuse
from index.ingest import embedding_text
from index.lexical import saturated
from index.types import Collection, FloatArray, IntArray, ScoredChunk, StoredChunk, TextEmbedder, TextReranker
from index.vector_index import VectorIndex, open_index, update_index

_MIN_DEPTH = 100  # rows of a ranking that are looked at first: what is deep in both may be the best of all

_Row: TypeAlias = tuple[str, int]  # collection name, row id
_Ranking: TypeAlias = Ranking[_Row]


@dataclass
class _Live:
    """A collection's index in memory. The lock keeps updates and searches apart."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    index: VectorIndex | None = None
    collection: Collection | None = None  # as it was when the index was brought up to date


@dataclass(frozen=True)
class _Scope:
    """Where to look. allowed: row ids int64 [n], None for all."""

    collection: Collection
    allowed: IntArray | None


@dataclass(frozen=True)
class _Asked:
    """One search. vector: float32 [dim], None where it is not needed."""

    question: str
    vector: FloatArray | None
    search: SearchConfig
    scopes: tuple[_Scope, ...]


class Retriever:
    """Searches collections; keeps their indexes in memory and follows their changes. Safe to use from many threads."""

    def __init__(
        self,
        catalogue: Catalogue,
        data_dir: DataDir,
        embedder: TextEmbedder,
        config: VectorIndexConfig | None = None,
        reranker: TextReranker | None = None,
    ) -> None:
        self._catalogue, self._data_dir, self._embedder = catalogue, data_dir, embedder
        self._config, self._reranker = config or VectorIndexConfig(), reranker
        self._live: dict[str, _Live] = {}

    @property
    def embedder(self) -> TextEmbedder:
        """What questions are turned into vectors by."""
        return self._embedder

    def search(
        self, collection: str, question: str, search: SearchConfig, filter: Filter | None = None
    ) -> list[ScoredChunk]:
        """`search_all` of one collection."""
        return self.search_all((collection,), question, search, filter)

    def search_all(
        self, collections: Sequence[str], question: str, search: SearchConfig, filter: Filter | None = None
    ) -> list[ScoredChunk]:
        """At most `search.top_k` chunks with different ids, best first, of documents that fit the filter.

        Raises CollectionNotFound, CollectionMismatch (made with another embedding model), or InvalidValue for an empty
        question or a re-ranker that is not loaded. A collection without chunks adds nothing.
        """
        if not question.strip():
            raise InvalidValue("question", "must not be empty")
        reranker = self._reranker_of(search)
        scopes = tuple(self._scope(name, filter) for name in dict.fromkeys(collections))
        vector = self._embedder.embed_question(question) if _lexical_weight(search) < 1 else None
        asked = _Asked(question, vector, search, scopes)
        if reranker is None:
            hits = self._best(asked, search.top_k)
        else:
            hits = self._best(asked, max(search.top_k, search.rerank_candidates))
            hits = _reranked(hits, reranker.scores(question, [embedding_text(hit.chunk) for hit in hits]))
        least = search.score_threshold or -np.inf
        return [hit for hit in hits[: search.top_k] if hit.score >= least]

    def refresh(self, collection: str) -> None:
        """Loads or updates the collection's index now, so that the next question does not wait for it."""
        current = self._current(collection)
        live = self._live_of(current)
        with live.lock:
            self._up_to_date(live, current)

    def _scope(self, name: str, filter: Filter | None) -> _Scope:
        current = self._current(name)
        return _Scope(current, None if filter is None else self._catalogue.rows_where(name, filter))

    def _current(self, name: str) -> Collection:
        try:
            current = self._catalogue.collection(name)
        except CollectionNotFound:
            self._live.pop(name, None)
            raise
        if current.embedding_fingerprint != self._embedder.fingerprint:
            raise CollectionMismatch(name, "embedding model", current.embedding_fingerprint, self._embedder.fingerprint)
        return current

    def _reranker_of(self, search: SearchConfig) -> TextReranker | None:
        if not search.reranker:
            return None
        if self._reranker is None or self._reranker.name != search.reranker:
            loaded = "none" if self._reranker is None else repr(self._reranker.name)
            raise InvalidValue(
                "reranker", f"{search.reranker!r} is not loaded (loaded is {loaded}); '' searches without"
            )
        return self._reranker

    def _best(self, asked: _Asked, wanted: int) -> list[ScoredChunk]:
        """The `wanted` best chunks; fewer only where there are no more."""
        limit = max(wanted, _MIN_DEPTH)
        while True:
            ranking, is_all = self._ranking(asked, limit)
            hits = self._distinct(ranking, wanted, asked.search.max_similarity)
            if len(hits) == wanted or is_all:
                return hits
            limit *= 2  # documents that share chunks make hits fewer than rows: look further

    def _ranking(self, asked: _Asked, limit: int) -> tuple[_Ranking, bool]:
        """The rows that are among the `limit` best of a search of a collection, and whether there are no more."""
        weight = _lexical_weight(asked.search)
        dense = [self._by_meaning(asked, scope, limit) if weight < 1 else [] for scope in asked.scopes]
        lexical = [self._by_words(asked, scope, limit) if weight > 0 else [] for scope in asked.scopes]
        is_all = all(len(found) < limit for found in (*dense, *lexical))
        by_meaning, by_words = _merged(dense), _merged(lexical)
        if asked.search.search_mode == "hybrid":
            return fuse([(by_meaning, 1 - weight), (by_words, weight)], asked.search.fusion), is_all
        return by_meaning or [(row, saturated(value)) for row, value in by_words], is_all

    def _by_words(self, asked: _Asked, scope: _Scope, limit: int) -> _Ranking:
        name = scope.collection.name
        found = self._catalogue.rows_by_words(name, asked.question, limit, scope.allowed)
        return [((name, row), value) for row, value in found]

    def _by_meaning(self, asked: _Asked, scope: _Scope, limit: int) -> _Ranking:
        assert asked.vector is not None
        current, allowed = scope.collection, scope.allowed
        live = self._live_of(current)
        with live.lock:
            scores, rows = self._up_to_date(live, current).search(asked.vector[None], limit, allowed)
        is_found = rows[0] >= 0
        scores, rows = scores[0][is_found], rows[0][is_found]
        if allowed is not None and len(rows) < min(limit, len(allowed)):  # an approximate index missed some
            rows, vectors = self._catalogue.vectors(current.name, allowed.tolist())
            scores = vectors @ asked.vector
        order = np.lexsort((rows, -scores))[:limit]
        cosines = scores[order].clip(-1, 1).tolist()
        return [((current.name, row), score) for row, score in zip(rows[order].tolist(), cosines, strict=True)]

    def _distinct(self, ranking: _Ranking, wanted: int, max_similarity: float) -> list[ScoredChunk]:
        """The first `wanted` chunks of the ranking, without those that repeat a better one."""
        hits: dict[str, ScoredChunk] = {}
        kept = Kept(max_similarity)
        for start in range(0, len(ranking), wanted):
            block = ranking[start : start + wanted]
            for hit, vector in self._hits(block, max_similarity < 1):
                if hit.chunk.chunk_id not in hits and not kept.repeats(hit.chunk.text, vector):
                    hits[hit.chunk.chunk_id] = hit
                if len(hits) == wanted:
                    return list(hits.values())
        return list(hits.values())

    def _hits(self, block: _Ranking, with_vectors: bool) -> Iterator[tuple[ScoredChunk, FloatArray | None]]:
        """The hit of each row, and its vector if asked for; without those that were removed since they were found."""
        chunks: dict[_Row, StoredChunk] = {}
        vectors: dict[_Row, FloatArray] = {}
        for name in dict.fromkeys(name for (name, _), _ in block):
            rows = [row for (of, row), _ in block if of == name]
            chunks |= {(name, row): chunk for row, chunk in self._catalogue.chunks_by_row(name, rows).items()}
            if with_vectors:
                found = zip(*self._catalogue.vectors(name, rows), strict=True)
                vectors |= {(name, int(row)): vector for row, vector in found}
        for row, score in block:
            if (stored := chunks.get(row)) is not None:
                yield ScoredChunk(stored.chunk, score, stored.source, row[0]), vectors.get(row)

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


def _merged(rankings: Sequence[_Ranking]) -> _Ranking:
    """Several rankings of one kind as one; equals in the order of their collections."""
    return sorted((item for ranking in rankings for item in ranking), key=lambda item: -item[1])


def _lexical_weight(search: SearchConfig) -> float:
    return {"dense": 0.0, "lexical": 1.0}.get(search.search_mode, search.lexical_weight)


def _reranked(hits: Sequence[ScoredChunk], scores: Sequence[float]) -> list[ScoredChunk]:
    judged = [replace(hit, score=score) for hit, score in zip(hits, scores, strict=True)]
    return sorted(judged, key=lambda hit: -hit.score)  # stable: equals stay in their order
