"""TEXT: documents → chunks → vectors → nearest chunks.

Knows nothing about keys and values, language models or HTTP. Read `types` first; then the way of a document
(`documents`, `chunking`, `embedding`, `catalogue`; all of it in `ingest`) and that of a question (`retrieval`).

Invariant: importing this package imports no model, index or parser library; each is imported when it is first used.
"""

from index.catalogue import Catalogue
from index.chunking import chunk_document
from index.config import ChunkingConfig, EmbeddingConfig, SearchConfig, VectorIndexConfig
from index.data_dir import DataDir
from index.documents import FoundFiles, find_files, read_documents
from index.embedding import Embedder
from index.errors import (
    CatalogueError,
    CatalogueVersionError,
    CollectionMismatch,
    CollectionNotFound,
    DataDirError,
    DataDirLocked,
    DocumentError,
    EmbeddingModelError,
    FusionRAGError,
    InvalidValue,
    RerankModelError,
    StorageFull,
    UnsupportedFormat,
)
from index.ingest import Ingestor, ingest
from index.rerank import Reranker
from index.retrieval import Retriever
from index.types import (
    Chunk,
    ChunkEncoder,
    Collection,
    CollectionCounts,
    Document,
    IngestFailure,
    IngestProgress,
    IngestReport,
    KVObject,
    ScoredChunk,
    Section,
    StoredChunk,
    StoredDocument,
    TextEmbedder,
    Vanished,
    chunk_id_of,
)
from index.vector_index import VectorIndex, open_index

__all__ = [
    "Catalogue",
    "CatalogueError",
    "CatalogueVersionError",
    "Chunk",
    "ChunkEncoder",
    "ChunkingConfig",
    "Collection",
    "CollectionCounts",
    "CollectionMismatch",
    "CollectionNotFound",
    "DataDir",
    "DataDirError",
    "DataDirLocked",
    "Document",
    "DocumentError",
    "Embedder",
    "EmbeddingConfig",
    "EmbeddingModelError",
    "FoundFiles",
    "FusionRAGError",
    "IngestFailure",
    "IngestProgress",
    "IngestReport",
    "Ingestor",
    "InvalidValue",
    "KVObject",
    "RerankModelError",
    "Reranker",
    "Retriever",
    "ScoredChunk",
    "SearchConfig",
    "Section",
    "StorageFull",
    "StoredChunk",
    "StoredDocument",
    "TextEmbedder",
    "UnsupportedFormat",
    "Vanished",
    "VectorIndex",
    "VectorIndexConfig",
    "chunk_document",
    "chunk_id_of",
    "find_files",
    "ingest",
    "open_index",
    "read_documents",
]
