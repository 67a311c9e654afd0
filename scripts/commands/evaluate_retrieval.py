"""`fusionrag evaluate retrieval`: recall of the gold passages, rank of the first, and time, for each search mode.

All passages of the dataset are pooled into one collection. Settings should be chosen on the first half of the questions
and reported on the second and on all, which is why the table shows all three.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

from tqdm import tqdm

from fusionrag.config import ModelConfig, PromptConfig
from fusionrag.errors import ConfigError
from index import Embedder, Reranker
from index.config import SEARCH_MODES, ChunkingConfig, EmbeddingConfig, SearchConfig, VectorIndexConfig
from scripts.evaluation.datasets import Example, load_dataset
from scripts.evaluation.retrieval import (
    CachingEmbedder,
    RetrievalRow,
    ask_all,
    first_half,
    format_rows,
    gold_passages,
    passage_ids,
    pooled,
    summarise,
)
from scripts.options import add_config_flags, build


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset", type=Path, help="CacheBlend, LongBench, HotpotQA, 2Wiki or SQuAD file")
    parser.add_argument("--limit", type=int, help="a sample of this many questions, the same for the same number")
    parser.add_argument("--ks", default="5,10", help="comma-separated numbers of hits (default: %(default)s)")
    parser.add_argument("--modes", default=",".join(SEARCH_MODES), help="comma-separated (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--config", type=Path, help=argparse.SUPPRESS)
    add_config_flags(
        parser, SearchConfig, ChunkingConfig, EmbeddingConfig, VectorIndexConfig, ModelConfig, PromptConfig
    )


def run(args: argparse.Namespace) -> int:
    search = build(SearchConfig, args)
    ks = _ks(args.ks)
    searches = [replace(search, search_mode=mode.strip(), top_k=max(ks)) for mode in args.modes.split(",")]
    examples = load_dataset(args.dataset, args.limit)
    num_gold = sum(bool(gold_passages(example)) for example in examples)
    if not num_gold:
        raise ConfigError("dataset", f"{args.dataset} neither marks gold passages nor has any that contain an answer")
    embedder = CachingEmbedder(build(EmbeddingConfig, args))
    rows = _measure(args, examples, searches, ks, embedder)
    print(format_rows(rows))
    marked = sum(bool(example.gold) for example in examples)
    print(
        f"\n{len(passage_ids(examples))} passages in one collection. Gold passages are marked for {marked} questions, "
        f"told by the answer for {num_gold - marked}; {len(examples) - num_gold} without are left out."
    )
    if args.json:
        args.json.write_text(json.dumps(_result(args, embedder, rows), indent=1) + "\n")
    return 0


def _measure(
    args: argparse.Namespace,
    examples: list[Example],
    searches: list[SearchConfig],
    ks: tuple[int, ...],
    embedder: Embedder,
) -> list[RetrievalRow]:
    from scripts.assembly import open_prompts

    device = build(EmbeddingConfig, args).embedding_device
    reranker = Reranker(searches[0].reranker, device) if searches[0].reranker else None
    rows = []
    chunking, vector_index = build(ChunkingConfig, args), build(VectorIndexConfig, args)
    with tqdm(total=len(passage_ids(examples)), unit="passage", desc="ingest", disable=None, file=sys.stderr) as bar:
        pool = pooled(examples, open_prompts(args), embedder, chunking, vector_index, reranker, bar.update)
        with pool as retriever:
            for search in searches:
                rows += summarise(
                    search.search_mode, ask_all(retriever, examples, search, ks), ks, first_half(examples)
                )
    return rows


def _result(args: argparse.Namespace, embedder: Embedder, rows: list[RetrievalRow]) -> dict[str, object]:
    from scripts.assembly import versions

    search, chunking = build(SearchConfig, args), build(ChunkingConfig, args)
    return {
        "command": "evaluate retrieval",
        "versions": versions(),
        "device": build(EmbeddingConfig, args).embedding_device,
        "model": embedder.fingerprint,
        "args": {"dataset": str(args.dataset), "limit": args.limit, **asdict(search), **asdict(chunking)},
        "rows": [_fields(row) for row in rows],
    }


def _fields(row: RetrievalRow) -> dict[str, object]:
    fields = asdict(row)
    ks, recalls = fields.pop("ks"), fields.pop("recalls")
    return {**fields, **{f"recall_at_{k}": recall for k, recall in zip(ks, recalls, strict=True)}}


def _ks(text: str) -> tuple[int, ...]:
    try:
        ks = tuple(int(word) for word in text.split(","))
    except ValueError as error:
        raise ConfigError("ks", f"must be comma-separated integers, got {text!r}") from error
    if min(ks) < 1:
        raise ConfigError("ks", f"must be at least 1, got {text!r}")
    return ks
