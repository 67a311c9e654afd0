"""`fusionrag delete PATH… --collection C`: what was read from these paths leaves the collection; `--all`: all of it.

With the passages go their vectors, words and KV; the files themselves are not touched. A running server follows.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from fusionrag.config import StoreConfig
from fusionrag.errors import ConfigError
from fusionrag.store import open_store
from fusionrag.sweep import discard_orphans, sweep
from index import Catalogue, DataDir, StoredDocument
from index.documents import file_id
from index.types import file_of
from index.vector_stores import VectorStores
from scripts.options import add_common_flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "paths",
        nargs="*",
        metavar="PATH",
        help="files, folders or records (FILE#ID) that were ingested; they need not exist any more",
    )
    parser.add_argument("--collection", required=True, help="collection to delete from")
    parser.add_argument("--all", action="store_true", help="delete the collection with everything in it")
    add_common_flags(parser)


def run(args: argparse.Namespace) -> int:
    if args.all == bool(args.paths):
        raise ConfigError("paths", "name what to delete, or --all for the whole collection")
    data_dir = DataDir(args.data_dir)
    with data_dir.lock(exclusive=True), Catalogue(data_dir.catalogue) as catalogue:
        before = catalogue.counts(args.collection)
        if args.all:
            VectorStores(catalogue, data_dir).delete(args.collection, catalogue.collection(args.collection).owner)
            num_documents, num_chunks = before.num_documents, before.num_chunks
        else:
            gone = _ingested_from(args.paths, args.collection, catalogue.documents(args.collection))
            for document in gone:
                catalogue.delete_document(args.collection, document.document_id)
            num_documents, num_chunks = len(gone), before.num_chunks - catalogue.counts(args.collection).num_chunks
        store = open_store(data_dir.kv, StoreConfig())
        discard_orphans(catalogue, store)
        freed = sweep(catalogue, store)
    print(f"{num_documents} documents with {num_chunks} chunks deleted, {freed / 2**20:.1f} MiB of KV freed")
    return 0


def _ingested_from(paths: Sequence[str], collection: str, documents: Sequence[StoredDocument]) -> list[StoredDocument]:
    """The documents read from `paths`. Raises ConfigError for a path that none was read from."""
    found: dict[str, StoredDocument] = {}
    for path in paths:
        those = [document for document in documents if _is_from(document, path)]
        if not those:
            raise ConfigError("paths", f"nothing in collection {collection!r} was ingested from {path!r}")
        if any(file_of(document.document_id) for document in those):
            raise ConfigError("paths", f"{path!r} was uploaded to the server; delete it there, as a file")
        found |= {document.document_id: document for document in those}
    return list(found.values())


def _is_from(document: StoredDocument, path: str) -> bool:
    """By its place on this machine, or by the source that citations show."""
    name = Path(path).as_posix()
    own = document.document_id.partition("-")[0] == file_id(path)
    return own or document.source == name or document.source.startswith((f"{name}/", f"{name}#"))
