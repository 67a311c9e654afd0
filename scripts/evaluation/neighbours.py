"""Related passages for the questions of a dataset, by the same rules as the offline job."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from fusionrag.config import PreprocessConfig
from fusionrag.preprocess.related import related_chunks
from index.config import EmbeddingConfig
from index.rare_words import RareWords
from scripts.evaluation.datasets import Example, Passage
from scripts.evaluation.vector_cache import cached_vectors


def related_passages(
    examples: Sequence[Example],
    extra: Sequence[Passage],
    preprocess: PreprocessConfig,
    embedding: EmbeddingConfig,
) -> dict[Passage, tuple[Passage, ...]]:
    """For each passage of the examples its `num_related` related others, among all examples' passages and `extra`."""
    if preprocess.num_related == 0:
        return {}
    own = list(dict.fromkeys(p for e in examples for p in e.passages))
    pool = list(dict.fromkeys([*own, *extra]))
    names = [str(i) for i in range(len(pool))]
    words = RareWords()
    for name, passage in zip(names, pool, strict=True):
        words.add(name, f"{passage.title} {passage.text}")
    vectors = np.empty((len(pool), 0), np.float32)
    if preprocess.related_by != "words":
        vectors = _embed([f"{p.title}: {p.text}" if p.title else p.text for p in pool], embedding)
    found = related_chunks(
        names[: len(own)], vectors[: len(own)], _BruteForce(vectors), dict(enumerate(names)), words, preprocess
    )
    return {pool[int(name)]: tuple(pool[int(other)] for other in others) for name, others in found.items()}


def outdated(
    related: Mapping[Passage, tuple[Passage, ...]], stale_share: float, seed: int = 0
) -> dict[Passage, tuple[Passage, ...]]:
    """`related` as it was before that share of its passages was rewritten: what KV that nobody refreshed is behind.

    In place of a passage that has changed stands what it was: its title over another passage's text, so nothing of
    what it says now. Where KV stands behind one chunk each, no prompt holds that old text, and such KV is never taken;
    where it stands behind all, the old text is part of what it has seen. Drawn by `seed` and the passage: what changes
    in a smaller share changes in a larger one too.
    """
    pool = list(dict.fromkeys([*related, *(other for others in related.values() for other in others)]))

    @cache
    def before(passage: Passage) -> Passage:
        draw = random.Random(f"{seed}:{passage.title}:{passage.text}")
        if draw.random() >= stale_share:
            return passage
        return Passage(passage.title, draw.choice([p.text for p in pool if p != passage]))

    return {passage: tuple(map(before, others)) for passage, others in related.items()}


@dataclass(frozen=True)
class _BruteForce:
    """Exact search without FAISS, which a bare GPU machine may lack. vectors: (n, dim) fp32 of unit length."""

    vectors: np.ndarray

    def search(self, vectors: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
        scores = vectors @ self.vectors.T
        rows = np.argsort(-scores, axis=1, kind="stable")[:, :top_k]
        return np.take_along_axis(scores, rows, 1), rows


def _embed(texts: Sequence[str], config: EmbeddingConfig) -> np.ndarray:
    def embed() -> np.ndarray:
        from tqdm import tqdm

        from index.embedding import Embedder

        with tqdm(total=len(texts), unit="passage", desc="embed", disable=None) as bar:
            return Embedder(config).embed(texts, lambda done: bar.update(done - bar.n))

    return cached_vectors(config.embedding_model, texts, embed)
