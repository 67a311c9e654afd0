"""`fusionrag doctor`: what is installed, what runs on what, what is cached, and why a chunk would miss its KV."""

from __future__ import annotations

import argparse
import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Sequence

from fusionrag.backends import describe_backends, describe_memory
from fusionrag.config import EngineConfig, ModelConfig, PreprocessConfig, PromptConfig, StoreConfig
from fusionrag.errors import FusionRAGError
from fusionrag.layout import Naming, naming
from fusionrag.model import LanguageModel, load_model
from fusionrag.prompt import PromptBuilder
from fusionrag.store import open_store
from fusionrag.store.tiered import TieredStore
from fusionrag.types import KVSpec, PromptChunk
from index import Catalogue, DataDir, KVObject
from scripts.assembly import device_name, versions
from scripts.options import add_common_flags, add_config_flags, build

DIFFERENCES = {  # field of a KVSpec → what a user calls it
    "model_fingerprint": "model",
    "dtype": "dtype",
    "codec": "codec",
    "prefix_ids": "instruction or chat template",
    "related": "set of related chunks",
    "owner": "owner",
    "format_version": "version of this program",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_flags(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    add_config_flags(parser, ModelConfig, PromptConfig, StoreConfig, EngineConfig, PreprocessConfig)


def run(args: argparse.Namespace) -> int:
    """Exit code 1 when the model cannot be loaded; everything else is reported."""
    report: dict[str, object] = {"versions": versions()}
    config, engine_config = build(StoreConfig, args), build(EngineConfig, args)
    model: LanguageModel | None = None
    try:
        memory = describe_memory(build(ModelConfig, args), engine_config, config)  # before any is taken
        model = load_model(build(ModelConfig, args))
        report["model"] = _describe(model)
        report["backends"] = describe_backends(model, engine_config, config)
        if memory:
            report["device_memory"] = memory
    except FusionRAGError as error:
        report["model"] = {"error": str(error)}
    data_dir = DataDir(args.data_dir)
    report["data_dir"] = {
        "path": str(args.data_dir),
        "free_gib": round(shutil.disk_usage(args.data_dir).free / 2**30, 1),
    }
    if model is not None:
        prompts = PromptBuilder(model.tokenizer, build(PromptConfig, args))
        store = open_store(data_dir.kv, config)
        with Catalogue(data_dir.catalogue) as catalogue:
            report["collections"] = {
                c.name: collection_report(
                    catalogue,
                    c.name,
                    prompts.fingerprint,
                    naming(model, config.kv_codec, prompts.prefix_ids, c.owner),
                    store,
                    build(PreprocessConfig, args).fuse_behind,
                )
                for c in catalogue.collections()
            }
    print(json.dumps(report) if args.json else _text(report))
    return 0 if model is not None else 1


def collection_report(
    catalogue: Catalogue,
    name: str,
    encoder_fingerprint: str,
    names: Naming,
    store: TieredStore,
    fused_behind: str,
) -> dict[str, object]:
    """Counts, and for every chunk whether its KV would be found by this model and prompt – or why not."""
    counts = catalogue.counts(name)
    found: dict[str, object] = {
        "documents": counts.num_documents,
        "chunks": counts.num_chunks,
        "tokens": counts.num_chunk_tokens,
    }
    if catalogue.collection(name).encoder_fingerprint != encoder_fingerprint:
        return found | {
            "usable": "no: ingested for another tokenizer or passage template; ingest it again for this model"
        }
    chunks = {s.chunk.chunk_id: s.chunk.token_ids for s in catalogue.chunks(name)}
    related = catalogue.related(name, chunks)
    booked: dict[str, list[KVObject]] = defaultdict(list)
    for item in catalogue.kv_objects(name):
        booked[item.chunk_id].append(item)
    reasons = Counter(
        _why(PromptChunk(chunk_id, token_ids, related.get(chunk_id), fused_behind), names, store, booked[chunk_id])
        for chunk_id, token_ids in chunks.items()
    )
    return found | {
        "kv_gib": round(counts.kv_bytes / 2**30, 2),
        "stale": counts.num_stale,
        "reuse": dict(reasons.most_common()),
    }


def _why(chunk: PromptChunk, names: Naming, store: TieredStore, booked: Sequence[KVObject]) -> str:
    """What a request would find for this chunk, behind related chunks of its own, and why it is not better."""
    reason = ""
    for spec in names.candidates(chunk, is_first=False, first_chunk_raw=True, before=chunk.related or ()):
        if store.contains(spec):
            return f"{spec.kind} KV is there" + (f"; fused KV is not: {reason}" if reason else _staleness(booked))
        reason = _why_absent(spec, store, [item for item in booked if item.kind == spec.kind])
    return f"miss: {reason}"


def _staleness(booked: Sequence[KVObject]) -> str:
    is_stale = any(item.is_stale for item in booked)
    return "; fused KV is stale: a chunk that it saw has left; run preprocess, or serve, which refreshes it" * is_stale


def _why_absent(spec: KVSpec, store: TieredStore, booked: Sequence[KVObject]) -> str:
    """Why the object that is looked for is not there. `booked`: this chunk's objects of this kind."""
    if store.is_set_aside(spec.digest):
        return "its file was damaged and is set aside; run preprocess"
    if any(item.digest == spec.digest for item in booked):
        return "its file is gone from the store (evicted by hand?); run preprocess"
    found = [fields for item in booked if (fields := store.written_for(item.digest)) is not None]
    if not found:
        return "never preprocessed; run preprocess"
    other = [words for name, words in DIFFERENCES.items() if found[0].get(name) != _as_json(getattr(spec, name))]
    return f"computed for another {' and '.join(other) or 'chunk'}; run preprocess with this configuration"


def _as_json(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _describe(model: LanguageModel) -> dict[str, object]:
    return {
        "name": model.name,
        "device": device_name(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "max_model_len": model.max_model_len,
        "layers": model.shape.num_layers,
        "kv_bytes_per_token": model.shape.kv_bytes_per_token(model.dtype),
        "fingerprint": model.fingerprint[:16],
    }


def _text(report: dict[str, object], indent: int = 0) -> str:
    lines = []
    for key, value in report.items():
        if isinstance(value, dict):
            lines += [" " * indent + str(key), _text(value, indent + 2)]
        else:
            lines.append(f"{' ' * indent}{key}: {value}")
    return "\n".join(line for line in lines if line)
