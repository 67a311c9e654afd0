"""Retrieval and prompt building on top of the engine: a question comes in, an engine request and its sources go out.

`Rag.prepare` blocks (it embeds and searches) and may be called from any thread; the engine belongs to one thread.
Knows nothing of HTTP.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fusionrag.config import RetrievalConfig, ReuseConfig
from fusionrag.engine import Engine
from fusionrag.errors import ConfigError, RequestError
from fusionrag.live_request import EngineRequest
from fusionrag.prompt import Offsets, PromptBuilder, Turn
from fusionrag.reprocess.probe import parse_layers
from fusionrag.sampling import SamplingParams
from fusionrag.types import ChunkReceipt, PromptChunk
from index.config import SearchConfig
from index.filters import Filter
from index.types import ScoredChunk, TextEmbedder, chunk_id_of

if TYPE_CHECKING:
    from index import Catalogue, Retriever

GREEDY = SamplingParams()

__all__ = ["InlineDocument", "Prepared", "Question", "Rag", "Source", "Turn"]


@dataclass(frozen=True)
class InlineDocument:
    """A passage that a request brings along instead of naming a collection. It is one chunk, however long."""

    title: str
    text: str
    document_id: str = ""


@dataclass(frozen=True)
class Question:
    """What a caller asks. Fields left None take the server's configuration."""

    turns: tuple[Turn, ...] = ()
    collections: tuple[str, ...] = ()
    documents: tuple[InlineDocument, ...] = ()
    search: SearchConfig | None = None
    filter: Filter | None = None  # only passages of documents whose metadata fits are found
    sampling: SamplingParams = GREEDY
    reuse: ReuseConfig | None = None
    prompt: str | None = None  # plain text: no template; no retrieval either
    owner: str = ""  # whose collections may be read and whose stored KV may be used
    explain: bool = False  # say which parts of the passages were recomputed


@dataclass(frozen=True)
class Source:
    """One passage of the prompt as the answer cites it. `index` is its place, from 1."""

    index: int
    chunk_id: str
    document_id: str
    title: str
    source: str
    text: str
    score: float | None = None
    page: int | None = None


@dataclass(frozen=True)
class Prepared:
    """A request ready for the engine, and what it will be answered from."""

    request: EngineRequest
    sources: tuple[Source, ...]
    offsets: tuple[Offsets, ...] = ()  # of each source's tokens in its text; only where an explanation is wanted

    def recomputed_text(self, receipts: Sequence[ChunkReceipt]) -> tuple[tuple[tuple[int, int], ...], ...]:
        """For each passage the characters [begin, end) of its text that were recomputed, joined and ascending."""
        return tuple(_char_ranges(o, r.recomputed) for o, r in zip(self.offsets, receipts, strict=True))


class Rag:
    """Answers questions over collections. Everything it needs is passed in; nothing is loaded here."""

    def __init__(
        self,
        engine: Engine,
        prompts: PromptBuilder,
        retrieval: RetrievalConfig,
        reuse: ReuseConfig,
        catalogue: Catalogue | None = None,
        retriever: Retriever | None = None,
        search: SearchConfig | None = None,
        fused_behind: str = "all",
    ) -> None:
        """fused_behind: as `preprocess` computed the fused KV (`PreprocessConfig.fuse_behind`)."""
        self.engine, self.prompts = engine, prompts
        self._retrieval, self.reuse = retrieval, reuse
        self.search = search or SearchConfig()
        self._catalogue, self._retriever, self._fused_behind = catalogue, retriever, fused_behind
        parse_layers(reuse.probe_layers, engine.model.shape.num_layers)  # now, not in the first request

    @property
    def model_name(self) -> str:
        return self.engine.model.name

    @property
    def max_model_len(self) -> int:
        return self.engine.model.max_model_len

    @property
    def catalogue(self) -> Catalogue | None:
        """Where the collections are; None where there are none."""
        return self._catalogue

    @property
    def embedder(self) -> TextEmbedder | None:
        """What collections are searched with; None where there are none."""
        return None if self._retriever is None else self._retriever.embedder

    def search_text(self, turns: Sequence[Turn]) -> str:
        """What a conversation's collections are searched for: the last question behind the `history_turns` before it.

        "When was she born?" finds nothing alone; she is named by the question before, or by its answer.
        """
        said = [turn for turn in turns if turn.role != "system"]
        asked = [i for i, turn in enumerate(said) if turn.role == "user"][-1 - self._retrieval.history_turns :]
        return "\n".join(turn.content for turn in said[asked[0] :]) if asked else ""

    def prepare(self, question: Question, request_id: str) -> Prepared:
        """Retrieves, builds the prompt. Raises CollectionNotFound, RequestError and their kin; see fusionrag.errors."""
        arrival = time.perf_counter()
        reuse = question.reuse or self.reuse
        if question.prompt is not None:
            sources: tuple[Source, ...] = ()
            plan = self.prompts.plain_plan(question.prompt)
        else:
            chunks, sources = self._passages(question)
            plan = self.prompts.plan(chunks, question.turns)
        retrieve_ms = (time.perf_counter() - arrival) * 1e3
        request = EngineRequest(
            request_id, plan, question.sampling, reuse, arrival, retrieve_ms, question.owner, question.explain
        )
        offsets = tuple(self.prompts.text_offsets(s.title, s.text) for s in sources) if question.explain else ()
        return Prepared(request, sources, offsets)

    def _passages(self, question: Question) -> tuple[Sequence[PromptChunk], tuple[Source, ...]]:
        if question.documents:
            return self._inline(question.documents)
        if not question.collections:
            return (), ()
        if self._catalogue is None or self._retriever is None:
            raise RequestError("this server has no collections; send the passages as 'documents'", "collection")
        found = self._hits(self._catalogue, self._retriever, question)
        if self._retrieval.order == "similarity_last":
            found.reverse()
        related: dict[tuple[str, str], tuple[str, ...]] = {}
        for name in {hit.collection for hit in found}:
            ids = [hit.chunk.chunk_id for hit in found if hit.collection == name]
            related |= {(name, chunk_id): others for chunk_id, others in self._catalogue.related(name, ids).items()}
        chunks = [
            PromptChunk(
                hit.chunk.chunk_id,
                hit.chunk.token_ids,
                related.get((hit.collection, hit.chunk.chunk_id)),
                self._fused_behind,
            )
            for hit in found
        ]
        return chunks, tuple(_source(i, hit) for i, hit in enumerate(found, start=1))

    def _hits(self, catalogue: Catalogue, retriever: Retriever, question: Question) -> list[ScoredChunk]:
        for name in question.collections:
            collection = catalogue.use_collection(name, question.owner)
            if collection.encoder_fingerprint != self.prompts.fingerprint:
                raise ConfigError(
                    "model",
                    f"collection {name!r} was chunked for another tokenizer or passage template; "
                    "serve the model it was ingested with, or ingest it again into a new collection",
                )
        search, asked = question.search or self.search, self.search_text(question.turns)
        return retriever.search_all(question.collections, asked, search, question.filter)

    def _inline(self, documents: Sequence[InlineDocument]) -> tuple[Sequence[PromptChunk], tuple[Source, ...]]:
        chunks, sources = [], []
        for i, document in enumerate(documents, start=1):
            token_ids = tuple(self.prompts.encode(document.title, document.text))
            chunk = PromptChunk(chunk_id_of(token_ids), token_ids)
            document_id = document.document_id or f"document-{i}"
            chunks.append(chunk)
            sources.append(Source(i, chunk.chunk_id, document_id, document.title, document_id, document.text))
        return chunks, tuple(sources)


def _source(index: int, hit: ScoredChunk) -> Source:
    chunk = hit.chunk
    return Source(index, chunk.chunk_id, chunk.document_id, chunk.title, hit.source, chunk.text, hit.score, chunk.page)


def _char_ranges(offsets: Offsets, token_ranges: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Token ranges as character ranges of the text; what lies outside it (title, template) is left out."""
    found: list[tuple[int, int]] = []
    for token in (token for begin, end in token_ranges for token in range(begin, end)):
        begin, end = offsets[token]
        if begin < end and found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        elif begin < end:
            found.append((begin, end))
    return tuple(found)


def with_ratio(reuse: ReuseConfig, method: str | None, recompute_ratio: float | None) -> ReuseConfig:
    """A request's own method and ratio on top of the configured ones. Raises ConfigError naming the field."""
    if method is not None:
        reuse = reuse.with_method(method)
    return reuse if recompute_ratio is None else replace(reuse, recompute_ratio=recompute_ratio)
