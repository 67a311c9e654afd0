"""How well each search mode finds the passages that support a dataset's questions, and how fast.

All passages of the dataset are pooled into one collection, made by the same chunking and embedding as `ingest`, and
every question is asked of it. Knows nothing about language models but the tokenizer that cuts passages into chunks.

Invariant: all modes are asked the same questions of the same collection, and are scored alike. A question's gold
passages are those that the dataset marks; where it marks none, its own passages that contain an answer; a question with
neither is left out.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory

from index import Catalogue, DataDir, Document, Embedder, Ingestor, Retriever, Section
from index.config import ChunkingConfig, SearchConfig, VectorIndexConfig
from index.types import ChunkEncoder, FloatArray, TextEmbedder, TextReranker
from scripts.evaluation.datasets import Example, Passage, contains_answer
from scripts.evaluation.report import table
from scripts.evaluation.vector_cache import cached_vectors

COLLECTION = "pool"
_HALVES_SEED = 1  # settings are chosen on the first half; another seed would mix the halves


@dataclass(frozen=True)
class Asked:
    """One question in one mode. `recalls` are the shares of its gold passages among the first k chunks, for each k."""

    example_id: str
    recalls: tuple[float, ...]
    reciprocal_rank: float  # of the first gold passage; 0 where none was found
    ms: float


@dataclass(frozen=True)
class RetrievalRow:
    """One mode on one part of the questions ('first half', 'second half' or 'all'). Recalls in percent."""

    search_mode: str
    part: str
    ks: tuple[int, ...]
    recalls: tuple[float, ...]
    mrr: float
    ms_p50: float
    n: int


class CachingEmbedder(Embedder):
    """The real embedder, but that it keeps the vectors of passages. Questions are always embedded: that is timed."""

    def embed(self, texts: Sequence[str], progress: Callable[[int], None] | None = None) -> FloatArray:
        """float32 [len(texts), dim]."""
        return cached_vectors(self.fingerprint, texts, lambda: super(CachingEmbedder, self).embed(texts, progress))


@contextmanager
def pooled(
    examples: Sequence[Example],
    encoder: ChunkEncoder,
    embedder: TextEmbedder,
    chunking: ChunkingConfig,
    vector_index: VectorIndexConfig,
    reranker: TextReranker | None = None,
    progress: Callable[[], object] | None = None,
) -> Iterator[Retriever]:
    """A retriever over the collection of all passages of the examples, each once; it goes when the context ends.

    A passage's document id is its place among the different passages: `passage_ids` gives the same numbers.
    """
    with TemporaryDirectory() as scratch:
        data_dir = DataDir(Path(scratch))
        with Catalogue(data_dir.catalogue) as catalogue:
            ingestor = Ingestor(catalogue, encoder, embedder, chunking)
            ingestor.add_documents(_documents(examples, progress), COLLECTION)
            retriever = Retriever(catalogue, data_dir, embedder, vector_index, reranker)
            retriever.refresh(COLLECTION)
            yield retriever


def passage_ids(examples: Sequence[Example]) -> dict[Passage, str]:
    """The document id of every different passage, in the order of their first appearance."""
    return {p: str(i) for i, p in enumerate(dict.fromkeys(p for e in examples for p in e.passages))}


def gold_passages(example: Example) -> tuple[Passage, ...]:
    """The passages that support the answer: as marked, else those that contain an answer; () if there are none."""
    if example.gold:
        return tuple(example.passages[place] for place in example.gold)
    return tuple(passage for passage in example.passages if contains_answer(passage.text, example.answers))


def ask_all(retriever: Retriever, examples: Sequence[Example], search: SearchConfig, ks: Sequence[int]) -> list[Asked]:
    """Asks every question that has gold passages, which are found if any of their chunks is."""
    ids = passage_ids(examples)
    search = replace(search, top_k=max(ks))
    asked = []
    for example in examples:
        gold = {ids[passage] for passage in gold_passages(example)}
        if gold:
            start = time.perf_counter()
            hits = retriever.search(COLLECTION, example.question, search)
            ms = (time.perf_counter() - start) * 1e3
            found = [hit.chunk.document_id for hit in hits]
            recalls = tuple(len(gold.intersection(found[:k])) / len(gold) for k in ks)
            rank = next((1 / place for place, name in enumerate(found, start=1) if name in gold), 0.0)
            asked.append(Asked(example.example_id, recalls, rank, ms))
    return asked


def first_half(examples: Sequence[Example]) -> frozenset[str]:
    """The ids of half of the examples, drawn at random but always alike: to choose settings on."""
    order = list(examples)
    random.Random(_HALVES_SEED).shuffle(order)
    return frozenset(example.example_id for example in order[: len(order) // 2])


def summarise(search_mode: str, asked: Sequence[Asked], ks: Sequence[int], first: frozenset[str]) -> list[RetrievalRow]:
    """The mode's rows: of the questions whose ids are in `first`, of the others, and of all."""
    halves = {"first half": True, "second half": False}
    parts = {part: [a for a in asked if (a.example_id in first) is is_first] for part, is_first in halves.items()}
    return [_row(search_mode, part, some, ks) for part, some in {**parts, "all": list(asked)}.items() if some]


def format_rows(rows: Sequence[RetrievalRow]) -> str:
    """The rows as an aligned table, part by part. Recall in percent, MRR in [0, 1], milliseconds a question."""
    header = ["mode", "questions", *(f"recall@{k}" for k in rows[0].ks), "MRR", "ms_p50", "n"]
    cells = [
        [r.search_mode, r.part, *(f"{recall:.1f}" for recall in r.recalls), f"{r.mrr:.3f}", f"{r.ms_p50:.1f}", str(r.n)]
        for part in dict.fromkeys(row.part for row in rows)
        for r in rows
        if r.part == part
    ]
    return table(header, cells)


def _row(search_mode: str, part: str, asked: Sequence[Asked], ks: Sequence[int]) -> RetrievalRow:
    recalls = tuple(100 * fmean(a.recalls[i] for a in asked) for i in range(len(ks)))
    mrr, ms = fmean(a.reciprocal_rank for a in asked), median(a.ms for a in asked)
    return RetrievalRow(search_mode, part, tuple(ks), recalls, mrr, ms, len(asked))


def _documents(examples: Sequence[Example], progress: Callable[[], object] | None) -> Iterator[Document]:
    for passage, document_id in passage_ids(examples).items():
        yield Document(document_id, passage.title, (Section("", passage.text),), document_id)
        if progress is not None:
            progress()
