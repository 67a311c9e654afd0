"""Laying out a request: which stored KV each chunk takes, and stitching it into the request's span.

Sits above `preprocess` and `reprocess`, which both need it. A chunk without usable stored KV is not an error: its
positions are reported as `missing` and computed in place.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from fusionrag.arena import KVArena
from fusionrag.config import ReuseConfig
from fusionrag.model import LanguageModel
from fusionrag.stitch import CaptureKV, place_
from fusionrag.store.base import KVStore, StoredHit
from fusionrag.types import (
    ChunkKV,
    ChunkReceipt,
    KVKind,
    KVSource,
    KVSpec,
    PromptChunk,
    PromptPlan,
    RowGroup,
    Span,
)


@dataclass(frozen=True)
class Naming:
    """The part of a `KVSpec` that is the same for all chunks of one model, prefix, codec and owner."""

    model_fingerprint: str
    dtype: str
    codec: str
    prefix_ids: tuple[int, ...]
    owner: str = ""

    def spec(self, token_ids: Sequence[int], kind: KVKind, related: tuple[str, ...] = ()) -> KVSpec:
        return KVSpec(
            self.model_fingerprint,
            self.dtype,
            self.codec,
            self.prefix_ids,
            tuple(token_ids),
            kind,
            related,
            self.owner,
        )

    def candidates(self, chunk: PromptChunk, is_first: bool, first_chunk_raw: bool) -> tuple[KVSpec, ...]:
        """The objects that may stand for a chunk, best first: raw is exact behind the prefix, else fused is nearer."""
        raw = self.spec(chunk.token_ids, "raw")
        if not chunk.related or (is_first and first_chunk_raw):
            return (raw,)
        return (self.spec(chunk.token_ids, "fused", chunk.related), raw)


def naming(model: LanguageModel, codec: str, prefix_ids: tuple[int, ...], owner: str = "") -> Naming:
    return Naming(model.fingerprint, str(model.dtype).removeprefix("torch."), codec, prefix_ids, owner)


@dataclass(frozen=True)
class Stitched:
    """A span whose stored KV is in place.

    missing: (M,) positions of chunk tokens that have to be computed in place, ascending.
    candidates: (K,) positions of reused tokens that may be selected, ascending.
    chunk_of: (N,) the chunk of each position, -1 for prefix and tail.
    """

    receipts: tuple[ChunkReceipt, ...]
    missing: torch.Tensor
    candidates: torch.Tensor
    chunk_of: torch.Tensor
    num_reused: int  # chunk tokens taken from the store
    load_ms: float
    reposition_ms: float


@torch.inference_mode()
def compute_prefix(model: LanguageModel, prefix_ids: tuple[int, ...]) -> ChunkKV:
    """The prefix's KV, un-rotated. Every prompt of a collection begins with it."""
    capture, ids = CaptureKV(), model.rows(prefix_ids)
    arena = model.new_arena(len(prefix_ids))
    model.forward([RowGroup(Span(0, len(prefix_ids)), *ids, observer=capture)], arena)
    return capture.chunk_kv()


@torch.inference_mode()
def stitch_(
    model: LanguageModel,
    arena: KVArena,
    span: Span,
    plan: PromptPlan,
    store: KVStore,
    names: Naming,
    prefix: ChunkKV,
    config: ReuseConfig,
) -> Stitched:
    """Loads what the store has for the plan's chunks and writes it, re-positioned, into the span."""
    device = model.device
    chunk_of = torch.full((plan.num_tokens,), -1, dtype=torch.int64, device=device)
    place_(arena, model.rope, span, 0, prefix)
    receipts: list[ChunkReceipt] = []
    missing, candidates = [], []
    load_ms = reposition_ms = 0.0
    for i, segment in enumerate(plan.chunks):
        assert segment.chunk is not None
        chunk_of[segment.start : segment.stop] = i
        positions = torch.arange(segment.start, segment.stop, device=device)
        begin = time.perf_counter()
        hit: StoredHit | None = None
        kind: KVKind = "raw"
        for spec in names.candidates(segment.chunk, i == 0, config.first_chunk_raw):
            hit, kind = store.get(spec), spec.kind
            if hit is not None:
                break
        load_ms += (time.perf_counter() - begin) * 1e3
        receipt = ChunkReceipt(segment.chunk.chunk_id, segment.num_tokens, KVSource.COMPUTED, kind)
        if hit is None:
            missing.append(positions)
        else:
            begin = time.perf_counter()
            place_(arena, model.rope, span, segment.start, hit.kv)
            reposition_ms += (time.perf_counter() - begin) * 1e3
            receipt = replace(receipt, source=hit.source)
            if i > 0 or kind != "raw":  # raw KV right behind the prefix is exact: nothing to select or correct
                candidates.append(positions)
        receipts.append(receipt)
    nothing = torch.empty(0, dtype=torch.int64, device=device)
    return Stitched(
        receipts=tuple(receipts),
        missing=torch.cat([nothing, *missing]),
        candidates=torch.cat([nothing, *candidates]),
        chunk_of=chunk_of,
        num_reused=sum(r.num_tokens for r in receipts if r.source is not KVSource.COMPUTED),
        load_ms=load_ms,
        reposition_ms=reposition_ms,
    )
