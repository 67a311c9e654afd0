"""Putting the parts together for the commands: what is built from which configuration, in one place."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fusionrag.config import (
    EngineConfig,
    ModelConfig,
    PreprocessConfig,
    PromptConfig,
    RetrievalConfig,
    ReuseConfig,
    StoreConfig,
)
from fusionrag.engine import Engine
from fusionrag.memory import check_device_memory
from fusionrag.model import LanguageModel, load_model, load_tokenizer
from fusionrag.prompt import PromptBuilder
from fusionrag.rag import Rag
from fusionrag.store import open_store
from fusionrag.store.tiered import TieredStore
from fusionrag.upkeep import Upkeep
from index import Catalogue, DataDir, Embedder, Reranker, Retriever
from index.config import ChunkingConfig, EmbeddingConfig, SearchConfig, VectorIndexConfig
from index.ingest_queue import IngestQueue
from index.library import Library
from index.library_types import MadeWith
from scripts.options import build

if TYPE_CHECKING:
    from server.live import LiveCollections


@dataclass(frozen=True)
class Parts:
    """A ready `Rag`, and what it stands on."""

    rag: Rag
    data_dir: DataDir
    catalogue: Catalogue
    embedder: Embedder
    retriever: Retriever
    store: TieredStore


@contextmanager
def open_rag(args: argparse.Namespace, model: LanguageModel | None = None) -> Iterator[Rag]:
    """A ready `Rag` over the data directory. Collections are read; nothing is written but quarantined KV."""
    with open_parts(args, model) as parts:
        yield parts.rag


@contextmanager
def open_parts(args: argparse.Namespace, model: LanguageModel | None = None) -> Iterator[Parts]:
    """As `open_rag`, for those who need its parts too."""
    data_dir = DataDir(args.data_dir)
    store_config = build(StoreConfig, args)
    engine_config = build(EngineConfig, args)
    if model is None:
        check_device_memory(build(ModelConfig, args), engine_config, store_config)
        model = load_model(build(ModelConfig, args))
    prompts = PromptBuilder(model.tokenizer, build(PromptConfig, args))
    store = open_store(data_dir.kv, store_config, for_gpu=model.device.type == "cuda")
    engine = Engine(
        model, store, engine_config, store_config.kv_codec, device_tier_bytes=store_config.device_tier_bytes
    )
    engine.prefix(prompts.prefix_ids)  # now, not in the first request
    embedding = build(EmbeddingConfig, args)
    embedder = Embedder(embedding)
    embedder.embed_question("warm up")  # loads the model now, not in the first request
    search = build(SearchConfig, args)
    reranker = Reranker(search.reranker, embedding.embedding_device) if search.reranker else None
    with Catalogue(data_dir.catalogue) as catalogue:
        retriever = Retriever(catalogue, data_dir, embedder, build(VectorIndexConfig, args), reranker)
        rag = Rag(
            engine,
            prompts,
            build(RetrievalConfig, args),
            build(ReuseConfig, args),
            catalogue,
            retriever,
            search,
            build(PreprocessConfig, args).fuse_behind,
        )
        yield Parts(rag, data_dir, catalogue, embedder, retriever, store)


def live_collections(args: argparse.Namespace, parts: Parts) -> LiveCollections:
    """What a server needs to change collections while it serves: uploads, their ingest, and the upkeep of their KV."""
    from server.config import IngestionConfig, ServerConfig
    from server.ingest_messages import Setup
    from server.ingestion import Ingestion
    from server.live import LiveCollections

    config, chunking = build(IngestionConfig, args), build(ChunkingConfig, args)
    setup = Setup(
        str(parts.data_dir.path.resolve()),
        build(ModelConfig, args),
        build(PromptConfig, args),
        chunking,
        build(EmbeddingConfig, args),
        config.ingest_nice,
        config.ingest_memory_bytes,
    )
    rag, catalogue, embedder = parts.rag, parts.catalogue, parts.embedder
    fingerprint = rag.prompts.fingerprint
    return LiveCollections(
        Library(catalogue, parts.data_dir, build(ServerConfig, args).max_owner_bytes),
        Ingestion(IngestQueue(catalogue, parts.data_dir), setup, config.ingest_timeout_s),
        parts.retriever,
        MadeWith(fingerprint, embedder.fingerprint, embedder.dim),
        chunking,
        Upkeep(
            rag.engine,
            catalogue,
            parts.data_dir,
            rag.prompts.prefix_ids,
            fingerprint,
            build(PreprocessConfig, args),
            build(VectorIndexConfig, args),
        ),
    )


def open_prompts(args: argparse.Namespace) -> PromptBuilder:
    """The prompt builder alone: ingest needs the tokenizer, not the weights."""
    return PromptBuilder(load_tokenizer(build(ModelConfig, args)), build(PromptConfig, args))


def versions() -> dict[str, str]:
    """What a result depends on; part of every JSON output."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str] = {"python": platform.python_version()}
    for package in ("torch", "transformers", "triton", "flash-attn", "faiss-cpu", "sentence-transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def device_name(model: LanguageModel) -> str:
    """The hardware a figure was measured on."""
    import os
    import platform

    import torch

    if model.device.type == "cuda":
        return torch.cuda.get_device_name(model.device)
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"


def result(command: str, model: LanguageModel, args: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The one JSON object of `--json`."""
    shown = {key: value for key, value in vars(args).items() if key not in ("command", "api_key", "json")}
    return {
        "command": command,
        "versions": versions(),
        "device": device_name(model),
        "model": {
            "name": model.name,
            "dtype": str(model.dtype).removeprefix("torch."),
            "fingerprint": model.fingerprint,
        },
        "args": {key: value if isinstance(value, int | float | list) else str(value) for key, value in shown.items()},
        "rows": rows,
    }
