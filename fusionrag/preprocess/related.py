"""Which chunks a chunk's fused KV is computed behind: those that name the same things, and its nearest neighbours.

Knows nothing of KV. The chunk itself and its near-duplicates are skipped (a copy of itself teaches a chunk nothing).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from fusionrag.config import PreprocessConfig
from index.rare_words import RareWords

SEARCH_BATCH = 1024


def related_chunks(
    chunk_ids: Sequence[str],
    vectors: np.ndarray,
    index: NearestVectors,
    chunk_id_of_row: Mapping[int, str],
    words: RareWords,
    config: PreprocessConfig,
) -> dict[str, tuple[str, ...]]:
    """Chunk id → ids of its related chunks, best first; vectors (n, dim) unit length, one per chunk id.

    words: of all chunks.
    """
    num, near_duplicate, by = config.num_related, config.near_duplicate, config.related_by
    if num == 0:
        return dict.fromkeys(chunk_ids, ())
    by_words = {c: words.nearest(c, num, near_duplicate) if by != "meaning" else () for c in chunk_ids}
    if by == "words":
        return by_words
    nearest = nearest_chunks(chunk_ids, vectors, index, chunk_id_of_row, num, near_duplicate)
    return {c: words_first(by_words[c], by_meaning, num) for c, by_meaning in nearest}


def words_first(by_words: Sequence[str], by_meaning: Sequence[str], limit: int) -> tuple[str, ...]:
    """At most `limit`, each once: the better half from `by_words`, a shared name being the stronger link, then
    `by_meaning`, then what is left of the words."""
    half = -(-limit // 2)
    return tuple(dict.fromkeys([*by_words[:half], *by_meaning, *by_words[half:]]))[:limit]


class NearestVectors(Protocol):
    """What is needed of a vector index."""

    def search(self, vectors: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
        """vectors (m, dim) fp32 → scores (m, k) descending, row ids (m, k) int64 with -1 where there are fewer."""
        ...


def nearest_chunks(
    chunk_ids: Sequence[str],
    vectors: np.ndarray,
    index: NearestVectors,
    chunk_id_of_row: Mapping[int, str],
    num_related: int,
    near_duplicate: float,
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(chunk id, ids of the nearest others) for each chunk; vectors (n, dim) unit length, one per chunk id.

    Looks at `4 * num_related + 8` neighbours, so a chunk with more near-duplicates than that gets fewer related chunks.
    """
    for begin in range(0, len(chunk_ids), SEARCH_BATCH):
        batch = slice(begin, begin + SEARCH_BATCH)
        scores, rows = index.search(vectors[batch], 4 * num_related + 8)
        for chunk_id, near_scores, near_rows in zip(chunk_ids[batch], scores, rows, strict=True):
            found: dict[str, None] = {}  # ordered, no duplicates
            for score, row in zip(near_scores.tolist(), near_rows.tolist(), strict=True):
                other = chunk_id_of_row.get(row)
                if other is not None and other != chunk_id and score < near_duplicate:
                    found[other] = None
            yield chunk_id, tuple(found)[:num_related]
