"""`fusionrag ingest PATH…`: documents → chunks → vectors, with a progress bar. Idempotent; safe to kill and repeat."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from fusionrag.config import ModelConfig, PromptConfig
from index import Catalogue, DataDir, Embedder, IngestProgress, IngestReport, ingest
from index.config import ChunkingConfig, EmbeddingConfig
from scripts.assembly import open_prompts
from scripts.options import add_common_flags, add_config_flags, build


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "paths", nargs="+", type=Path, metavar="PATH", help="files or folders: .txt .md .html .pdf .docx .json .jsonl"
    )
    parser.add_argument(
        "--collection", default="default", help="collection to add to; made if absent (default: %(default)s)"
    )
    add_common_flags(parser)
    add_config_flags(parser, ModelConfig, PromptConfig, ChunkingConfig, EmbeddingConfig)


def run(args: argparse.Namespace) -> int:
    """Exit code 1 when a file could not be read (the others are in), 0 otherwise."""
    chunking = build(ChunkingConfig, args)
    encoder, embedder = open_prompts(args), Embedder(build(EmbeddingConfig, args))
    data_dir = DataDir(args.data_dir)
    with data_dir.lock(exclusive=True), Catalogue(data_dir.catalogue) as catalogue:
        with tqdm(unit=" chunks", desc="ingest", disable=None) as bar:

            def show(progress: IngestProgress) -> None:
                bar.update(progress.num_chunks - bar.n)
                bar.set_postfix_str(
                    f"{progress.num_files_read}/{progress.num_files} files, {progress.num_documents} documents"
                )

            report = ingest(args.paths, args.collection, catalogue, encoder, embedder, chunking, show)
        counts = catalogue.counts(args.collection)
    _print(report)
    print(
        f"collection {args.collection}: {counts.num_documents} documents, {counts.num_chunks} chunks, "
        f"{counts.num_chunk_tokens} tokens"
    )
    return 1 if report.failed else 0


def _print(report: IngestReport) -> None:
    print(
        f"{report.num_added} documents added, {report.num_changed} changed, {report.num_unchanged} unchanged, "
        f"{report.num_removed} removed"
    )
    for failure in report.failed:
        print(f"not read: {failure.path}: {failure.reason}", file=sys.stderr)
    if report.unsupported:
        print(
            f"{len(report.unsupported)} files of unknown format left out, e.g. {report.unsupported[0]}", file=sys.stderr
        )
