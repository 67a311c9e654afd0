"""Related passages for the questions of a dataset, by the same embedding and rule as the offline job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fusionrag.preprocess.related import related_chunks
from index.config import EmbeddingConfig
from scripts.evaluation.datasets import Example, Passage
from scripts.evaluation.vector_cache import cached_vectors


def related_passages(
    examples: Sequence[Example],
    extra: Sequence[Passage],
    num_related: int,
    near_duplicate: float,
    config: EmbeddingConfig,
) -> dict[Passage, tuple[Passage, ...]]:
    """For each passage of the examples its `num_related` nearest others, among all examples' passages and `extra`."""
    if num_related == 0:
        return {}
    own = list(dict.fromkeys(p for e in examples for p in e.passages))
    pool = list(dict.fromkeys([*own, *extra]))
    vectors = _embed([f"{p.title}: {p.text}" if p.title else p.text for p in pool], config)
    names = [str(i) for i in range(len(pool))]
    found = related_chunks(
        names[: len(own)],
        vectors[: len(own)],
        _BruteForce(vectors),
        dict(enumerate(names)),
        num_related,
        near_duplicate,
    )
    return {pool[int(name)]: tuple(pool[int(other)] for other in others) for name, others in found}


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
