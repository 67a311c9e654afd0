"""Several rankings of chunks → one.

Knows nothing about where a ranking comes from. By score, a passage that one search finds far better than all others
stays ahead of those that both find middling; each search's scores are taken as shares of its best one, so that no scale
counts (a convex combination of normalised scores, as in Bruch et al., arXiv 2210.11934). By rank is the customary way,
for searches whose scores say less than their order.

Invariant: a fused score lies in [0, 1] and is 1 only where a chunk is the best of every ranking that has a weight.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import TypeAlias, TypeVar

RowT = TypeVar("RowT", bound=Hashable)
Ranking: TypeAlias = Sequence[tuple[RowT, float]]  # (row, score), best first

# Below the customary 60: at equal weights, 10 finds more within ten passages on MuSiQue than 30 does (89 % to 87 %).
_RANK_CONSTANT = 10


def fuse(rankings: Iterable[tuple[Ranking[RowT], float]], fusion: str) -> Ranking[RowT]:
    """One ranking of several, each with its weight (which add up to 1); equals stay in the order of their naming.

    A row's score is the sum of weight × share over the rankings that have it. fusion: 'scores' (relative score fusion)
    or 'ranks' (reciprocal rank fusion); see `SearchConfig`.
    """
    shares = score_shares if fusion == "scores" else rank_shares
    fused: dict[RowT, float] = {}
    for ranking, weight in rankings:
        for row, share in shares(ranking):
            fused[row] = fused.get(row, 0.0) + weight * share
    return sorted(((row, min(1.0, score)) for row, score in fused.items()), key=lambda item: -item[1])  # stable


def score_shares(ranking: Ranking[RowT]) -> Ranking[RowT]:
    """Each row's score as a share of the best one; 0 for a score below 0."""
    best = ranking[0][1] if ranking else 0.0
    return [(row, max(score, 0.0) / best if best > 0 else 0.0) for row, score in ranking]


def rank_shares(ranking: Ranking[RowT]) -> Ranking[RowT]:
    """(k + 1) / (k + rank) of each row, rank from 1."""
    return [(row, (_RANK_CONSTANT + 1) / (_RANK_CONSTANT + rank)) for rank, (row, _) in enumerate(ranking, start=1)]
