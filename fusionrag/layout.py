"""Laying out a request: which stored KV each chunk takes, and stitching it into the request's span.

Sits above `preprocess` and `reprocess`, which both need it. A chunk without usable stored KV is not an error: its
positions are reported as `missing` and computed in place.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise, zip_longest

import torch

from fusionrag.arena import KVArena
from fusionrag.config import ReuseConfig
from fusionrag.loading import Loader, Piece
from fusionrag.model import LanguageModel
from fusionrag.stitch import CaptureKV
from fusionrag.types import (
    ChunkKV,
    ChunkReceipt,
    KVArrival,
    KVKind,
    KVSource,
    KVSpec,
    PromptChunk,
    PromptPlan,
    RowGroup,
    Segment,
    Span,
)

MAX_SPECS = 4096  # kept with their digests, which take a tenth of a millisecond each; some 20 KiB a spec


@dataclass(frozen=True)
class Naming:
    """The part of a `KVSpec` that is the same for all chunks of one model, prefix, codec and owner."""

    model_fingerprint: str
    dtype: str
    codec: str
    prefix_ids: tuple[int, ...]
    owner: str = ""

    def spec(self, token_ids: Sequence[int], kind: KVKind, related: tuple[str, ...] = ()) -> KVSpec:
        return _spec(self, tuple(token_ids), kind, related)

    def candidates(
        self,
        chunk: PromptChunk,
        is_first: bool,
        first_chunk_raw: bool,
        before: Sequence[str] = (),
        after: Sequence[str] = (),
    ) -> tuple[KVSpec, ...]:
        """The objects that may stand for a chunk, best first. `before`, `after`: ids of the prompt's other chunks.

        Raw KV is exact right behind the prefix. KV that was fused behind one chunk is for prompts that hold that chunk:
        best in front of this one, where full prefill would have looked at it too. KV behind several is for any prompt.
        """
        raw = self.spec(chunk.token_ids, "raw")
        if is_first and first_chunk_raw:
            return (raw,)
        contexts = chunk.contexts
        if chunk.fused_behind == "each":
            contexts = tuple(c for place in (before, after) for c in contexts if c[0] in place)
        return (*(self.spec(chunk.token_ids, "fused", context) for context in contexts), raw)


@lru_cache(MAX_SPECS)
def _spec(names: Naming, token_ids: tuple[int, ...], kind: KVKind, related: tuple[str, ...]) -> KVSpec:
    return KVSpec(
        names.model_fingerprint, names.dtype, names.codec, names.prefix_ids, token_ids, kind, related, names.owner
    )


def plan_candidates(names: Naming, plan: PromptPlan, config: ReuseConfig) -> list[tuple[KVSpec, ...]]:
    """For each chunk of the plan, the objects that may stand for it, best first.

    Where nothing is recomputed, KV behind a chunk that follows in the prompt is left out: it has seen what full prefill
    would not have shown it, and nothing sets that right (-9 F1 points at ratio 0, +3 at 0.05 and 0.1).
    """
    chunks = [s.chunk for s in plan.chunks if s.chunk is not None]
    ids = [chunk.chunk_id for chunk in chunks]
    after = ids if config.effective_ratio > 0 else []
    return [
        names.candidates(chunk, i == 0, config.first_chunk_raw, ids[:i], after[i + 1 :])
        for i, chunk in enumerate(chunks)
    ]


def naming(model: LanguageModel, codec: str, prefix_ids: tuple[int, ...], owner: str = "") -> Naming:
    return Naming(model.fingerprint, str(model.dtype).removeprefix("torch."), codec, prefix_ids, owner)


@dataclass(frozen=True)
class Stitched:
    """A span whose stored KV is in place, or on its way (`arrival`).

    missing: (M,) positions of chunk tokens that have to be computed in place, ascending.
    first_missing: the first of them where there is no gap between them; else None.
    candidates: (K,) positions of reused tokens that may be selected, ascending.
    """

    receipts: tuple[ChunkReceipt, ...]
    missing: torch.Tensor
    candidates: torch.Tensor
    num_reused: int  # chunk tokens taken from the store
    load_ms: float  # finding it
    reposition_ms: float  # bringing it into the span; on a GPU, queueing that
    arrival: KVArrival | None = None
    first_missing: int | None = None


@torch.inference_mode()
def compute_prefix(model: LanguageModel, prefix_ids: tuple[int, ...]) -> ChunkKV:
    """The prefix's KV, un-rotated, on the model's device. Every prompt of a collection begins with it."""
    capture, ids = CaptureKV(), model.rows(prefix_ids)
    arena = model.new_arena(len(prefix_ids))
    model.forward([RowGroup(Span(0, len(prefix_ids)), *ids, observer=capture, first_position=0)], arena)
    return capture.chunk_kv()


@torch.inference_mode()
def stitch_(
    model: LanguageModel,
    loader: Loader,
    arena: KVArena,
    span: Span,
    plan: PromptPlan,
    candidates: Sequence[Sequence[KVSpec]],
    prefix: ChunkKV,
    send: Callable[[], object],
) -> Stitched:
    """Finds what is stored for the plan's chunks and brings it, re-positioned, into the span.

    candidates: for each chunk the objects that may stand for it, best first; chunks behind the last are left missing.
    prefix: rotated to where it stands in every prompt. send: as in `Loader.place_`.
    """
    begin = time.perf_counter()
    pieces, receipts = list[Piece](), list[ChunkReceipt]()
    missing, reused = list[Segment](), list[Segment]()
    for i, (segment, found) in enumerate(zip_longest(plan.chunks, loader.find(candidates))):
        assert segment.chunk is not None
        kind: KVKind = "raw" if found is None else found.spec.kind
        source = KVSource.COMPUTED if found is None else found.source
        receipts.append(ChunkReceipt(segment.chunk.chunk_id, segment.num_tokens, source, kind))
        if found is None:
            missing.append(segment)
            continue
        pieces.append(Piece(segment.start, found.payload, found.spec.digest))
        if i > 0 or kind != "raw":  # raw KV right behind the prefix is exact: nothing to select or correct
            reused.append(segment)
    found_at = time.perf_counter()
    arrival = loader.place_(arena, span, pieces, send)
    slots = slice(span.start, span.start + prefix.num_tokens)
    arena.keys[:, :, slots] = prefix.keys
    arena.values[:, :, slots] = prefix.values
    return Stitched(
        receipts=tuple(receipts),
        missing=_positions(missing, model.device),
        candidates=_positions(reused, model.device),
        num_reused=sum(r.num_tokens for r in receipts if r.source is not KVSource.COMPUTED),
        load_ms=(found_at - begin) * 1e3,
        reposition_ms=(time.perf_counter() - found_at) * 1e3,
        arrival=arrival,
        first_missing=_first_of_run(missing),
    )


def _positions(segments: Sequence[Segment], device: torch.device) -> torch.Tensor:
    """All positions of these segments, ascending, int64."""
    runs = list[list[int]]()
    for segment in segments:
        if runs and runs[-1][1] == segment.start:
            runs[-1][1] = segment.stop
        else:
            runs.append([segment.start, segment.stop])
    if not runs:
        return torch.empty(0, dtype=torch.int64, device=device)
    found = [torch.arange(start, stop, device=device) for start, stop in runs]
    return found[0] if len(found) == 1 else torch.cat(found)


def _first_of_run(segments: Sequence[Segment]) -> int | None:
    """Where the segments begin, if each begins where the one before it ends."""
    is_run = segments and all(before.stop == after.start for before, after in pairwise(segments))
    return segments[0].start if is_run else None
