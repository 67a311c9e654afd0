"""Every knob of `index`: one field = one knob = one CLI flag = one TOML key, the same name everywhere.

Knows nothing about the command line: flags and the configuration table of the docs are generated from these fields and
their `help`.

Invariant: an object of these classes is valid; a value out of range raises InvalidValue (a ValueError) that names the
field and the allowed range.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from index.errors import InvalidValue

MIN_CHUNK_TOKENS, MAX_CHUNK_TOKENS = 16, 32_768
MAX_EMBEDDING_BATCH = 4096
_DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")


def knob(default: Any, help: str) -> Any:
    """A dataclass field with the help text that the command line and the docs show."""
    return field(default=default, metadata={"help": help})


def require(condition: bool, name: str, message: str) -> None:
    """Raises InvalidValue naming the field unless `condition`."""
    if not condition:
        raise InvalidValue(name, message)


@dataclass(frozen=True)
class ChunkingConfig:
    """How documents are cut into passages. Sizes are tokens of the language model, passage template included."""

    chunk_tokens: int = knob(512, "longest passage in tokens of the language model, title and template included")
    chunk_overlap_tokens: int = knob(
        0, "whole sentences of up to this many tokens are repeated at the start of the next passage"
    )

    def __post_init__(self) -> None:
        low, high, half = MIN_CHUNK_TOKENS, MAX_CHUNK_TOKENS, self.chunk_tokens // 2
        require(
            low <= self.chunk_tokens <= high, "chunk_tokens", f"must lie in [{low}, {high}], got {self.chunk_tokens}"
        )
        require(
            0 <= self.chunk_overlap_tokens <= half,
            "chunk_overlap_tokens",
            f"must lie in [0, chunk_tokens / 2 = {half}], got {self.chunk_overlap_tokens}",
        )


@dataclass(frozen=True)
class EmbeddingConfig:
    """Which model turns text into vectors, and where it runs."""

    embedding_model: str = knob(
        "all-MiniLM-L6-v2",
        "embedding model: 'all-MiniLM-L6-v2' (packaged, no network), a local directory, or a hub id",
    )
    embedding_batch_size: int = knob(16, "texts embedded in one forward pass; a GPU likes more, e.g. 128")
    embedding_device: str = knob("cpu", "'cpu', 'cuda', 'cuda:1', 'mps', or 'auto' (CUDA when there is one)")

    def __post_init__(self) -> None:
        size = self.embedding_batch_size
        require(bool(self.embedding_model.strip()), "embedding_model", "must not be empty")
        require(
            1 <= size <= MAX_EMBEDDING_BATCH,
            "embedding_batch_size",
            f"must lie in [1, {MAX_EMBEDDING_BATCH}], got {size}",
        )
        require(
            _DEVICE.fullmatch(self.embedding_device) is not None,
            "embedding_device",
            f"must be 'auto', 'cpu', 'mps', 'cuda' or 'cuda:N', got {self.embedding_device!r}",
        )


@dataclass(frozen=True)
class VectorIndexConfig:
    """How nearest vectors are found."""

    faiss_factory: str = knob(
        "Flat", "FAISS index factory string; 'Flat' is exact, e.g. 'IVF1024,Flat' or 'HNSW32' trade recall for speed"
    )

    def __post_init__(self) -> None:
        require(bool(self.faiss_factory.strip()), "faiss_factory", "must not be empty")
        require(
            "IDMap" not in self.faiss_factory,
            "faiss_factory",
            f"must not name an IDMap (row ids are kept by the index itself), got {self.faiss_factory!r}",
        )


SEARCH_MODES = ("dense", "lexical", "hybrid")
FUSIONS = ("scores", "ranks")
MAX_HITS = 200


@dataclass(frozen=True)
class SearchConfig:
    """Which passages a question finds."""

    top_k: int = knob(10, "passages retrieved for a question")
    search_mode: str = knob(
        "hybrid",
        "how passages are found: dense (by meaning: embeddings), lexical (by words: BM25), or hybrid (both)",
    )
    lexical_weight: float = knob(0.5, "share of the lexical ranking in hybrid search; the dense one has the rest")
    fusion: str = knob(
        "scores",
        "how hybrid search joins the two: scores (their sum, each as a share of the best one found) or ranks "
        "(reciprocal rank fusion)",
    )
    score_threshold: float = knob(
        0.0,
        "least score of a retrieved passage; 0: no threshold. The score is the cosine in dense search, b / (b + 10) of "
        "the BM25 value b in lexical search, in hybrid search the fused score as a share of the best possible, "
        "and with a re-ranker its judgement; all are at most 1",
    )
    max_similarity: float = knob(
        0.98,
        "a passage at least this similar (cosine) to a better one, with the same numbers in it, is left out for the "
        "next; 1: all are kept",
    )
    reranker: str = knob(
        "", "cross-encoder that sorts the passages found anew: a local sentence-transformers directory or a hub id"
    )
    rerank_candidates: int = knob(30, "passages that the re-ranker sorts, of which top_k are kept")

    def __post_init__(self) -> None:
        require(1 <= self.top_k <= MAX_HITS, "top_k", f"must lie in [1, {MAX_HITS}], got {self.top_k}")
        require(
            self.search_mode in SEARCH_MODES,
            "search_mode",
            f"must be one of {', '.join(SEARCH_MODES)}, got {self.search_mode!r}",
        )
        require(self.fusion in FUSIONS, "fusion", f"must be one of {', '.join(FUSIONS)}, got {self.fusion!r}")
        for name in ("lexical_weight", "score_threshold"):
            value = getattr(self, name)
            require(0 <= value <= 1, name, f"must lie in [0, 1], got {value}")
        require(0 < self.max_similarity <= 1, "max_similarity", f"must lie in (0, 1], got {self.max_similarity}")
        require(
            1 <= self.rerank_candidates <= MAX_HITS,
            "rerank_candidates",
            f"must lie in [1, {MAX_HITS}], got {self.rerank_candidates}",
        )
