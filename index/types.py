"""The nouns of `index`: documents, chunks, and what a search returns. Read this file first.

Knows nothing about keys and values, language models or HTTP. Everything that leaves a module of this package is one
of these frozen dataclasses.

Invariant (I2 of docs/architecture.md): a chunk's token ids are fixed when it is made; nobody re-tokenises its text.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

FloatArray: TypeAlias = NDArray[np.float32]
IntArray: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True)
class Section:
    """A run of text of a document under one heading. `heading` is '' where the format has none."""

    heading: str
    text: str
    page: int | None = None  # 1-based page of a paged format (PDF), else None


@dataclass(frozen=True)
class Document:
    """One thing a user added: a file, or one record of a JSONL file.

    `document_id` is stable over re-ingests of the same source (it names the source, not the content);
    `content_hash` says whether the content has changed.
    """

    document_id: str
    title: str
    sections: tuple[Section, ...]
    source: str  # the path or URI that a citation shows
    metadata: Mapping[str, str | int | float | bool] = field(default_factory=dict)

    @property
    def text(self) -> str:
        return "\n\n".join(s.text for s in self.sections)

    @property
    def content_hash(self) -> str:
        """Hex SHA-256 of title and sections: equal hashes ⇔ nothing to re-ingest."""
        digest = hashlib.sha256()
        for part in (self.title, *(f"{s.heading}\x1f{s.text}" for s in self.sections)):
            digest.update(part.encode() + b"\x1e")
        return digest.hexdigest()


@dataclass(frozen=True)
class Chunk:
    """A passage as the language model reads it.

    `chunk_id` is the hash of `token_ids`: two chunks with equal tokens are the same chunk, whatever document they
    came from, and share one stored KV.
    """

    title: str
    text: str
    token_ids: tuple[int, ...]
    document_id: str
    ordinal: int  # place within its document, from 0
    page: int | None = None

    @property
    def chunk_id(self) -> str:
        return chunk_id_of(self.token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class ScoredChunk:
    """A search hit. A higher `score` is better; which one it is, the search decides (`SearchConfig`):

    dense       cosine of question and chunk, in [-1, 1]
    lexical     b / (b + 10) of the BM25 value b, in (0, 1)
    hybrid      weighted sum of shares of the best (see `fusion`), in [0, 1]
    re-ranked   the re-ranker's logit through a sigmoid, in (0, 1), whatever found the chunk
    """

    chunk: Chunk
    score: float
    source: str  # Document.source, for citations
    collection: str = ""  # where it was found


class ChunkEncoder(Protocol):
    """How the language model spells a passage. Supplied by the caller; `index` never loads a language model."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever `encode` could return other ids (tokenizer or passage template changed)."""
        ...

    def encode(self, title: str, text: str) -> list[int]:
        """Token ids of the whole passage, template included (e.g. of `f"{title}: {text}\\n\\n"`), no special tokens."""
        ...


def chunk_id_of(token_ids: Sequence[int]) -> str:
    """Hex SHA-256 (first 32 digits) of the ids as little-endian 32-bit integers."""
    return hashlib.sha256(np.array(token_ids, "<u4").tobytes()).hexdigest()[:32]


_OF_FILE = re.compile(r"(file-[0-9a-f]{24})(?:-[0-9a-f]{16})?")


def file_of(document_id: str) -> str | None:
    """The id of the uploaded file that the document was read from; None where it was not read from an upload."""
    found = _OF_FILE.fullmatch(document_id)
    return None if found is None else found[1]


class TextEmbedder(Protocol):
    """Turns text into unit vectors; `index.embedding.Embedder` is the real one."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever `embed` could return other vectors."""
        ...

    @property
    def name(self) -> str: ...

    @property
    def dim(self) -> int: ...

    def num_tokens(self, texts: Sequence[str]) -> list[int]:
        """Of each text, without special tokens."""
        ...

    def embed(self, texts: Sequence[str], progress: Callable[[int], None] | None = None) -> FloatArray:
        """float32 [len(texts), dim], unit length. `progress` is told how many texts are done."""
        ...

    def embed_question(self, question: str) -> FloatArray:
        """float32 [dim], unit length, to be compared with the vectors of `embed`."""
        ...


class TextReranker(Protocol):
    """Judges texts against a question; `index.rerank.Reranker` is the real one."""

    @property
    def name(self) -> str:
        """As `SearchConfig.reranker` names it."""
        ...

    def scores(self, question: str, texts: Sequence[str]) -> list[float]:
        """How well each text answers the question, in [0, 1]."""
        ...


@dataclass(frozen=True)
class Collection:
    """One named corpus. All its chunks were made by one encoder and one embedding model."""

    collection_id: int  # never used again, even if a collection of the same name is made later
    name: str
    owner: str  # name of the API key it belongs to; '': the operator's
    encoder_fingerprint: str
    embedding_fingerprint: str
    dim: int
    revision: int  # goes up with every change of documents, chunks or vectors
    kv_revision: int  # goes up with every change of related chunks or KV objects


@dataclass(frozen=True)
class StoredChunk:
    """A chunk as the catalogue keeps it. `row_id` names its vector and is never used again."""

    row_id: int
    chunk: Chunk
    source: str  # Document.source


@dataclass(frozen=True)
class StoredDocument:
    """What the catalogue knows of a document besides its chunks."""

    document_id: str
    title: str
    source: str
    metadata: Mapping[str, str | int | float | bool]
    num_chunks: int


@dataclass(frozen=True)
class KVObject:
    """Where a chunk's stored KV is: `digest` names the object in the store. `index` knows nothing else about KV."""

    digest: str
    chunk_id: str
    kind: Literal["raw", "fused"]
    num_bytes: int
    related: tuple[str, ...] = ()  # chunk ids that stood in front, in order; empty for raw
    is_stale: bool = False  # a related chunk has left the collection since


@dataclass(frozen=True)
class Vanished:
    """What left a collection with a document. `kv_digests` are the KV objects that nothing refers to any more.

    The digests also wait in `Catalogue.kv_garbage` until `forget_kv`, so that a crash before the files are removed
    loses no trace of them.
    """

    chunk_ids: tuple[str, ...] = ()
    kv_digests: tuple[str, ...] = ()


@dataclass(frozen=True)
class CollectionCounts:
    """The size of a collection. `num_chunks` counts chunks with different ids."""

    num_documents: int
    num_chunks: int
    num_chunk_tokens: int
    num_raw: int  # raw KV objects
    num_fused: int  # fused KV objects that are not stale
    num_stale: int
    kv_bytes: int


@dataclass(frozen=True)
class IngestFailure:
    """A file that could not be read (to its end), and why."""

    path: str
    reason: str


IngestStage: TypeAlias = Literal["parsing", "chunking", "embedding", "storing"]


@dataclass(frozen=True)
class IngestProgress:
    """How far an ingest has come."""

    num_files: int
    num_files_read: int
    num_documents: int  # read so far, unchanged ones included
    num_chunks: int  # embedded so far
    num_chunks_cut: int = 0  # of the documents read so far, unchanged ones left out
    stage: IngestStage = "parsing"


@dataclass(frozen=True)
class IngestReport:
    """What an ingest did. Documents are counted once each; `num_chunks` counts the chunks written."""

    num_added: int = 0
    num_changed: int = 0
    num_unchanged: int = 0
    num_removed: int = 0  # records that have left their JSON or JSONL file
    num_chunks: int = 0
    failed: tuple[IngestFailure, ...] = ()
    unsupported: tuple[str, ...] = ()  # files of unknown format found in the directories
