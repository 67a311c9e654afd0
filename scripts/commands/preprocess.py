"""`fusionrag preprocess`: raw and fused KV of all chunks of a collection that lack it.

Resumable: what is in the store is never computed again, so kill it whenever you like and start it again. `--shard 2/4`
computes the second quarter; shards run side by side, on any number of machines that share the data directory.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tqdm import tqdm

from fusionrag.config import EngineConfig, ModelConfig, PreprocessConfig, PromptConfig, StoreConfig
from fusionrag.errors import ConfigError
from fusionrag.layout import naming
from fusionrag.memory import check_device_memory
from fusionrag.model import load_model
from fusionrag.preprocess.job import PreprocessJob
from fusionrag.preprocess.related import related_chunks
from fusionrag.prompt import PromptBuilder
from fusionrag.store import open_store
from fusionrag.store.tiered import TieredStore
from fusionrag.sweep import discard_orphans, sweep
from fusionrag.types import PromptChunk
from index import Catalogue, DataDir, open_index
from index.config import VectorIndexConfig
from index.rare_words import RareWords
from index.types import KVObject
from scripts.options import add_common_flags, add_config_flags, build

BOOK_EVERY = 32  # objects per transaction of the catalogue: the store is what counts, the books may lag a little


@dataclass(frozen=True)
class Shard:
    """Part `number` of `count`, from 1."""

    number: int = 1
    count: int = 1

    def has(self, place: int) -> bool:
        return place % self.count == self.number - 1


def parse_shard(text: str) -> Shard:
    """'2/4' → the second of four. Raises ConfigError."""
    number, slash, count = text.partition("/")
    if not (slash and number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise ConfigError("shard", f"must be i/n with 1 <= i <= n, such as 2/4; got {text!r}")
    return Shard(int(number), int(count))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--collection", default="default", help="collection to preprocess (default: %(default)s)")
    parser.add_argument("--shard", default="1/1", metavar="i/n", help="compute only part i of n (default: %(default)s)")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="stop after the first N chunks; 0: all")
    add_common_flags(parser)
    add_config_flags(parser, PreprocessConfig, ModelConfig, PromptConfig, StoreConfig, EngineConfig, VectorIndexConfig)


def run(args: argparse.Namespace) -> int:
    shard, store_config = parse_shard(args.shard), build(StoreConfig, args)
    data_dir = DataDir(args.data_dir)
    with data_dir.lock(exclusive=False), Catalogue(data_dir.catalogue) as catalogue:
        collection = catalogue.collection(args.collection)
        check_device_memory(
            build(ModelConfig, args), build(EngineConfig, args), replace(store_config, device_tier_bytes=0)
        )
        model = load_model(build(ModelConfig, args))
        prompts = PromptBuilder(model.tokenizer, build(PromptConfig, args))
        if collection.encoder_fingerprint != prompts.fingerprint:
            raise ConfigError(
                "model", f"collection {args.collection!r} was ingested for another tokenizer or passage template"
            )
        token_ids_of = {s.chunk.chunk_id: s.chunk.token_ids for s in catalogue.chunks(args.collection)}
        related, behind = _set_related(catalogue, data_dir, args), build(PreprocessConfig, args).fuse_behind
        every = [PromptChunk(c, token_ids_of[c], related.get(c, ()), behind) for c in token_ids_of]
        chunks = [chunk for i, chunk in enumerate(every) if shard.has(i)][: args.limit or None]
        store = open_store(data_dir.kv, store_config, for_gpu=model.device.type == "cuda")
        names = naming(model, store_config.kv_codec, prompts.prefix_ids, collection.owner)
        job = PreprocessJob(model, store, names, token_ids_of, build(EngineConfig, args))
        computed = _run(job, chunks, catalogue, args.collection)
        freed = _sweep(catalogue, store, args.collection, every)
        counts = catalogue.counts(args.collection)
    print(
        f"collection {args.collection}: {computed} objects computed; {counts.num_raw} raw and "
        f"{counts.num_fused} fused of "
        f"{counts.num_chunks} chunks, {counts.kv_bytes / 2**30:.2f} GiB"
        + (f", {freed / 2**20:.0f} MiB freed" if freed else "")
    )
    return 0


def _set_related(catalogue: Catalogue, data_dir: DataDir, args: argparse.Namespace) -> dict[str, tuple[str, ...]]:
    """Finds every chunk's related chunks, by vectors and words, and writes them to the catalogue."""
    config = build(PreprocessConfig, args)
    row_ids, vectors = catalogue.vectors(args.collection)
    chunk_id_of_row = {s.row_id: s.chunk.chunk_id for s in catalogue.chunks(args.collection)}
    index = open_index(catalogue, args.collection, data_dir, build(VectorIndexConfig, args))
    chunk_ids = [chunk_id_of_row[row] for row in row_ids.tolist()]
    words = RareWords()
    for stored in catalogue.chunks(args.collection):
        words.add(stored.chunk.chunk_id, f"{stored.chunk.title} {stored.chunk.text}")
    found = related_chunks(chunk_ids, vectors, index, chunk_id_of_row, words, config)
    catalogue.set_related(args.collection, found)
    return found


def _run(job: PreprocessJob, chunks: list[PromptChunk], catalogue: Catalogue, collection: str) -> int:
    """Runs the job under a progress bar in tokens, and books what is stored."""
    tokens = sum(len(c.token_ids) for c in [*job.raw_chunks(chunks), *(c for c in chunks for _ in c.contexts)])
    waiting: list[KVObject] = []
    num_computed = num_bytes = 0
    with tqdm(total=tokens, unit="tok", unit_scale=True, desc="preprocess", smoothing=0.1, disable=None) as bar:
        for stored in job.run(chunks):
            bar.update(len(stored.chunk.token_ids))
            num_computed += stored.computed
            num_bytes += stored.num_bytes * stored.computed
            bar.set_postfix_str(f"{stored.spec.kind}, {num_computed} objects, {num_bytes / 2**20:.0f} MiB")
            waiting.append(stored.entry)
            if len(waiting) >= BOOK_EVERY:
                catalogue.record_kv(collection, waiting)
                waiting.clear()
    catalogue.record_kv(collection, waiting)
    return num_computed


def _sweep(catalogue: Catalogue, store: TieredStore, collection: str, chunks: Sequence[PromptChunk]) -> int:
    """Deletes objects that nothing refers to: garbage, orphans, and fused KV behind related chunks that are old.

    Another shard may still be computing the new ones; until they are there, such chunks are reused raw.
    """
    wanted = {chunk.chunk_id: chunk.contexts for chunk in chunks}
    old = [
        o.digest
        for o in catalogue.kv_objects(collection)
        if o.kind == "fused" and o.chunk_id in wanted and o.related not in wanted[o.chunk_id]
    ]
    freed = sum(store.delete(digest) for digest in old)
    catalogue.forget_kv(old)
    discard_orphans(catalogue, store)
    return freed + sweep(catalogue, store)
