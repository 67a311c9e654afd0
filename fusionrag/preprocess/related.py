"""Which chunks stand in front of a chunk when its fused KV is computed: its nearest neighbours in the index.

Knows nothing of KV. The chunk itself and its near-duplicates are skipped (a copy of itself teaches a chunk nothing);
the order is by descending similarity.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

SEARCH_BATCH = 1024


class NearestVectors(Protocol):
    """What is needed of a vector index."""

    def search(self, vectors: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
        """vectors (m, dim) fp32 → scores (m, k) descending, row ids (m, k) int64 with -1 where there are fewer."""
        ...


def related_chunks(
    chunk_ids: Sequence[str],
    vectors: np.ndarray,
    index: NearestVectors,
    chunk_id_of_row: dict[int, str],
    num_related: int,
    near_duplicate: float,
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(chunk id, ids of its related chunks) for each chunk; vectors (n, dim) unit length, one per chunk id.

    Looks at `4 * num_related + 8` neighbours, so a chunk with more near-duplicates than that gets fewer related chunks.
    """
    if num_related == 0:
        yield from ((chunk_id, ()) for chunk_id in chunk_ids)
        return
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
