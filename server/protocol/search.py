"""How a request changes the server's search, in OpenAI's words. Knows nothing of HTTP."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field

from index.config import SearchConfig
from server.protocol.common import Strict

MAX_RESULTS = 50


class HybridSearch(Strict):
    """What each of the two searches counts for; only the ratio matters."""

    embedding_weight: float = Field(ge=0)
    text_weight: float = Field(ge=0)


class RankingOptions(Strict):
    """`ranker`: whether there is a re-ranker is up to the server; 'none' leaves it out."""

    ranker: Literal["none", "auto", "default-2024-11-15"] | None = None
    score_threshold: float | None = Field(default=None, ge=0, le=1)
    hybrid_search: HybridSearch | None = None


def changed_search(
    default: SearchConfig, max_num_results: int | None, ranking: RankingOptions | None
) -> SearchConfig | None:
    """The server's search with a request's changes; None when there are none. Raises InvalidValue."""
    changes: dict[str, object] = {} if max_num_results is None else {"top_k": max_num_results}
    if ranking is not None:
        if ranking.score_threshold is not None:
            changes["score_threshold"] = ranking.score_threshold
        if ranking.ranker == "none":
            changes["reranker"] = ""
        if (weights := ranking.hybrid_search) is not None:
            total = weights.embedding_weight + weights.text_weight
            changes |= {"search_mode": "hybrid", "lexical_weight": weights.text_weight / total if total else 0.5}
    return replace(default, **changes) if changes else None  # type: ignore[arg-type]
