"""Vectors of texts, kept in the cache folder: the slow part on a CPU, and for the same texts always the same."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from fusionrag.default_model import cache_dir
from index.types import FloatArray


def cached_vectors(model: str, texts: Sequence[str], embed: Callable[[], FloatArray]) -> FloatArray:
    """float32 [len(texts), dim]: what `embed` returned when these texts were embedded together before, or returns now.

    `model` names the embedding model.
    """
    key = hashlib.sha256("\x1e".join([model, *texts]).encode()).hexdigest()[:24]
    path = cache_dir() / "embeddings" / f"{key}.npy"
    if path.exists():
        stored: FloatArray = np.load(path, allow_pickle=False)
        return stored
    vectors = embed()
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, vectors)
    return vectors
