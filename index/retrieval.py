"""Question → the best chunks of a collection: by meaning (vectors), by words (BM25), or by both.

Knows nothing about prompts or KV. Stages: filter → dense and lexical rankings → fusion → leaving out near-duplicates →
re-ranking → threshold.

Invariants: an answer comes from a revision of the collection that was current when the search began, or a later one;
fewer than `top_k` chunks are found only where no more fit (lexical search: share a word with the question), but that an
approximate index may miss some where there is no filter.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from index.catalogue import Catalogue
from index.config import SearchConfig, VectorIndexConfig
from index.data_dir import DataDir
from index.errors import CollectionMismatch, CollectionNotFound, InvalidValue
from index.filters import Filter
from index.ingest import embedding_text
from index.types import Collection, FloatArray, IntArray, ScoredChunk, TextEmbedder, TextReranker
from index.vector_index import VectorIndex, open_index, update_index

# Below the customary 60: at equal weights, 10 finds more within ten passages on MuSiQue than 30 does (89 % to 87 %).
_RRF_K = 10
_MIN_DEPTH = 100  # rows of a ranking that are looked at first: what is deep in both may be the best of all
_NUMBER = re.compile(r"\d+")

_Ranking = list[tuple[int, float]]  # (row id, score), best first


@dataclass
class _Live:
    """A collection's index in memory. The lock keeps updates and searches apart."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    index: VectorIndex | None = None
    collection: Collection | None = None  # as it was when the index was brought up to date


@dataclass(frozen=True)
class _Asked:
    """One search. vector: float32 [dim], None where it is not needed; allowed: row ids int64 [n], None for all."""

    question: str
    vector: FloatArray | None
    search: SearchConfig
    allowed: IntArray | None


class _Kept:
    """The vectors and numbers of the hits so far, to tell a near-duplicate by.

    Embeddings hardly see numbers, and two records or revisions of a text may differ in nothing else: passages with
    different numbers are no duplicates.
    """

    def __init__(self, max_similarity: float) -> None:
        self._limit = max_similarity
        self._vectors: list[FloatArray] = []
        self._numbers: list[list[str]] = []

    def repeats(self, text: str, vector: FloatArray | None) -> bool:
        """Whether a better hit says the same; if not, this one is kept too."""
        if vector is None:
            return False
        numbers = sorted(_NUMBER.findall(text))
        if self._vectors:
            similar = np.flatnonzero(np.stack(self._vectors) @ vector >= self._limit)
            if any(numbers == self._numbers[i] for i in similar):
                return True
        self._vectors.append(vector)
        self._numbers.append(numbers)
        return False


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
        """At most `search.top_k` chunks with different ids, best first, of documents that fit the filter.

        Raises CollectionNotFound, CollectionMismatch (made with another embedding model), or InvalidValue for an empty
        question or a re-ranker that is not loaded. A collection without chunks gives an empty list.
        """
        if not question.strip():
            raise InvalidValue("question", "must not be empty")
        reranker = self._reranker_of(search)
        current = self._current(collection)
        allowed = None if filter is None else self._catalogue.rows_where(collection, filter)
        vector = self._embedder.embed_question(question) if _lexical_weight(search) < 1 else None
        asked = _Asked(question, vector, search, allowed)
        if reranker is None:
            hits = self._best(current, asked, search.top_k)
        else:
            hits = self._best(current, asked, max(search.top_k, search.rerank_candidates))
            hits = _reranked(hits, reranker.scores(question, [embedding_text(hit.chunk) for hit in hits]))
        least = search.score_threshold or -np.inf
        return [hit for hit in hits[: search.top_k] if hit.score >= least]

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

    def _reranker_of(self, search: SearchConfig) -> TextReranker | None:
        if not search.reranker:
            return None
        if self._reranker is None or self._reranker.name != search.reranker:
            loaded = "none" if self._reranker is None else repr(self._reranker.name)
            raise InvalidValue(
                "reranker", f"{search.reranker!r} is not loaded (loaded is {loaded}); '' searches without"
            )
        return self._reranker

    def _best(self, current: Collection, asked: _Asked, wanted: int) -> list[ScoredChunk]:
        """The `wanted` best chunks; fewer only where there are no more."""
        limit = max(wanted, _MIN_DEPTH)
        while True:
            ranking, is_all = self._ranking(current, asked, limit)
            hits = self._distinct(current, ranking, wanted, asked.search.max_similarity)
            if len(hits) == wanted or is_all:
                return hits
            limit *= 2  # documents that share chunks make hits fewer than rows: look further

    def _ranking(self, current: Collection, asked: _Asked, limit: int) -> tuple[_Ranking, bool]:
        """The rows that are among the `limit` best of a ranking, and whether there are no more."""
        weight = _lexical_weight(asked.search)
        dense = self._by_meaning(current, asked, limit) if weight < 1 else []
        lexical = self._by_words(current, asked, limit) if weight > 0 else []
        is_all = len(dense) < limit and len(lexical) < limit
        if asked.search.search_mode == "hybrid":
            return reciprocal_rank_fusion([(dense, 1 - weight), (lexical, weight)]), is_all
        return dense or lexical, is_all

    def _by_words(self, current: Collection, asked: _Asked, limit: int) -> _Ranking:
        return self._catalogue.rows_by_words(current.name, asked.question, limit, asked.allowed)

    def _by_meaning(self, current: Collection, asked: _Asked, limit: int) -> _Ranking:
        assert asked.vector is not None
        live = self._live_of(current)
        with live.lock:
            scores, rows = self._up_to_date(live, current).search(asked.vector[None], limit, asked.allowed)
        is_found = rows[0] >= 0
        scores, rows = scores[0][is_found], rows[0][is_found]
        if asked.allowed is not None and len(rows) < min(limit, len(asked.allowed)):  # an approximate index missed some
            rows, vectors = self._catalogue.vectors(current.name, asked.allowed.tolist())
            scores = vectors @ asked.vector
        order = np.lexsort((rows, -scores))[:limit]
        return list(zip(rows[order].tolist(), scores[order].clip(-1, 1).tolist(), strict=True))

    def _distinct(
        self, current: Collection, ranking: _Ranking, wanted: int, max_similarity: float
    ) -> list[ScoredChunk]:
        """The first `wanted` chunks of the ranking, without those that repeat a better one."""
        hits: dict[str, ScoredChunk] = {}
        kept = _Kept(max_similarity)
        for start in range(0, len(ranking), wanted):
            block = dict(ranking[start : start + wanted])
            stored = self._catalogue.chunks_by_row(current.name, block)
            row_ids, vectors = self._catalogue.vectors(current.name, block) if max_similarity < 1 else ((), ())
            vector_of = dict(zip(row_ids, vectors, strict=True))
            for row, score in block.items():
                found = stored.get(row)  # None: it was removed between the look-ups
                chunk_id = found.chunk.chunk_id if found else ""
                if found is None or chunk_id in hits:
                    continue
                if not kept.repeats(found.chunk.text, vector_of.get(row)):
                    hits[chunk_id] = ScoredChunk(found.chunk, score, found.source)
                if len(hits) == wanted:
                    return list(hits.values())
        return list(hits.values())

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


def reciprocal_rank_fusion(rankings: Sequence[tuple[_Ranking, float]]) -> _Ranking:
    """One ranking of several with their weights (which add up to 1), as a share of the best possible: in (0, 1].

    A row's score is the sum of weight × (k + 1) / (k + rank), rank from 1, over the rankings that have it.
    """
    scores: dict[int, float] = {}
    for ranking, weight in rankings:
        for rank, (row, _) in enumerate(ranking, start=1):
            scores[row] = scores.get(row, 0.0) + weight * (_RRF_K + 1) / (_RRF_K + rank)
    return sorted(((row, min(1.0, score)) for row, score in scores.items()), key=lambda item: (-item[1], item[0]))


def _lexical_weight(search: SearchConfig) -> float:
    return {"dense": 0.0, "lexical": 1.0}.get(search.search_mode, search.lexical_weight)


def _reranked(hits: Sequence[ScoredChunk], scores: Sequence[float]) -> list[ScoredChunk]:
    judged = [replace(hit, score=score) for hit, score in zip(hits, scores, strict=True)]
    return sorted(judged, key=lambda hit: -hit.score)  # stable: equals stay in their order
