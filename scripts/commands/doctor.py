"""`fusionrag doctor`: what is installed and chosen, what is cached, and why a chunk would miss its stored KV."""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
from collections import Counter
from collections.abc import Set

from fusionrag.config import ModelConfig, PromptConfig, StoreConfig
from fusionrag.errors import FusionRAGError
from fusionrag.layout import Naming, naming
from fusionrag.model import LanguageModel, load_model
from fusionrag.prompt import PromptBuilder
from fusionrag.store import KVStore, open_store
from fusionrag.types import PromptChunk
from index import Catalogue, DataDir
from scripts.assembly import device_name, versions
from scripts.options import add_common_flags, add_config_flags, build

ACCELERATORS = {"flash_attn": "not used yet: attention runs on torch SDPA", "triton": "not used yet"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_flags(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    add_config_flags(parser, ModelConfig, PromptConfig, StoreConfig)


def run(args: argparse.Namespace) -> int:
    """Exit code 1 when the model cannot be loaded; everything else is reported."""
    report: dict[str, object] = {"versions": versions(), "optional": _optional()}
    model: LanguageModel | None = None
    try:
        model = load_model(build(ModelConfig, args))
        report["model"] = _describe(model)
    except FusionRAGError as error:
        report["model"] = {"error": str(error)}
    data_dir = DataDir(args.data_dir)
    report["data_dir"] = {
        "path": str(args.data_dir),
        "free_gib": round(shutil.disk_usage(args.data_dir).free / 2**30, 1),
    }
    if model is not None:
        prompts = PromptBuilder(model.tokenizer, build(PromptConfig, args))
        config = build(StoreConfig, args)
        names, store = naming(model, config.kv_codec, prompts.prefix_ids), open_store(data_dir.kv, config)
        with Catalogue(data_dir.catalogue) as catalogue:
            report["collections"] = {
                c.name: collection_report(catalogue, c.name, prompts.fingerprint, names, store)
                for c in catalogue.collections()
            }
    print(json.dumps(report) if args.json else _text(report))
    return 0 if model is not None else 1


def collection_report(
    catalogue: Catalogue, name: str, encoder_fingerprint: str, names: Naming, store: KVStore
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
    booked = {(o.chunk_id, o.kind) for o in catalogue.kv_objects(name)}
    reasons = Counter(
        _why(PromptChunk(chunk_id, token_ids, related.get(chunk_id)), names, store, booked)
        for chunk_id, token_ids in chunks.items()
    )
    return found | {
        "kv_gib": round(counts.kv_bytes / 2**30, 2),
        "stale": counts.num_stale,
        "reuse": dict(reasons.most_common()),
    }


def _why(chunk: PromptChunk, names: Naming, store: KVStore, booked: Set[tuple[str, str]]) -> str:
    """What a request would find for this chunk, anywhere but right behind the prefix."""
    for spec in names.candidates(chunk, is_first=False, first_chunk_raw=True):
        if store.contains(spec):
            if spec.kind == "raw" and chunk.related:
                return "raw only: fused KV is missing; run preprocess"
            return f"{spec.kind} KV is there"
    if (chunk.chunk_id, "raw") in booked or (chunk.chunk_id, "fused") in booked:
        return "miss: KV was computed for another model, dtype, codec or prefix, or its file is gone; run preprocess"
    return "miss: never preprocessed; run preprocess"


def _optional() -> dict[str, str]:
    return {name: use if importlib.util.find_spec(name) else "not installed" for name, use in ACCELERATORS.items()}


def _describe(model: LanguageModel) -> dict[str, object]:
    return {
        "name": model.name,
        "device": device_name(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "max_model_len": model.max_model_len,
        "layers": model.shape.num_layers,
        "kv_bytes_per_token": model.shape.kv_bytes_per_token(model.dtype),
        "fingerprint": model.fingerprint[:16],
        "attention": "torch scaled_dot_product_attention over row blocks",
    }


def _text(report: dict[str, object], indent: int = 0) -> str:
    lines = []
    for key, value in report.items():
        if isinstance(value, dict):
            lines += [" " * indent + str(key), _text(value, indent + 2)]
        else:
            lines.append(f"{' ' * indent}{key}: {value}")
    return "\n".join(line for line in lines if line)
