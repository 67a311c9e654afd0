"""Two rankings of chunks → one: by meaning (cosine) and by words (BM25), competing by score.

Knows nothing about where a ranking comes from. Scores, not ranks, are joined: a passage that one search finds far
better than all others stays ahead of those that both find middling. Each search's scores are taken as shares of its
best one, so that no scale counts (a convex combination of normalised scores, as in Bruch et al., arXiv 2210.11934).

Invariant: a fused score lies in [0, 1] and is 1 only where a chunk is the best of every ranking that has a weight.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

RowT = TypeVar("RowT", bound=Hashable)


def relative_score_fusion(rankings: Iterable[tuple[Sequence[tuple[RowT, float]], float]]) -> list[tuple[RowT, float]]:
    """One ranking of several, each given with its weight; the weights add up to 1. Best first, equals as first named.

    A ranking is (row, score) pairs, in any order. A row's score is the sum of weight × score / best score; where a
    ranking does not have the row, or gives it less than 0, that ranking adds nothing.
    """
    fused: dict[RowT, float] = {}
    for ranking, weight in rankings:
        best = max((score for _, score in ranking), default=0.0)
        for row, score in ranking:
            share = max(score, 0.0) / best if best > 0 else 0.0
            fused[row] = fused.get(row, 0.0) + weight * share
    return sorted(((row, min(1.0, score)) for row, score in fused.items()), key=lambda item: -item[1])  # stable
