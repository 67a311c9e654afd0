"""The two offline passes as sets of rows: raw (chunks right behind the prefix) and fused (behind related chunks).

Both run through the model's one `forward`, several chunks a pass. Knows nothing of files, indexes or progress.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fusionrag.arena import KVArena
from fusionrag.errors import ArenaFull
from fusionrag.model import LanguageModel
from fusionrag.stitch import CaptureKV, place_
from fusionrag.types import ChunkKV, RowGroup, Span


@dataclass(frozen=True)
class ChunkJob:
    """One chunk's KV to compute behind `context` – its related chunks' raw KV in order; empty for the raw pass."""

    token_ids: tuple[int, ...]
    context: tuple[ChunkKV, ...] = ()

    @property
    def num_context_tokens(self) -> int:
        return sum(kv.num_tokens for kv in self.context)


@torch.inference_mode()
def compute_chunks(model: LanguageModel, arena: KVArena, prefix: ChunkKV, jobs: Sequence[ChunkJob]) -> list[ChunkKV]:
    """The KV of each job's chunk, computed at the positions right behind prefix and context; one forward pass.

    Raises ArenaFull, with nothing computed, where Σ (prefix + context + chunk) slots are not free in the arena.
    """
    spans: list[Span] = []
    groups: list[RowGroup] = []
    captures: list[CaptureKV] = []
    try:
        for job in jobs:
            begin = prefix.num_tokens + job.num_context_tokens
            span = arena.allocate(begin + len(job.token_ids))
            if span is None:
                raise ArenaFull(f"{len(jobs)} chunks with their context do not fit into {arena.num_free} free slots")
            spans.append(span)
            _lay_out(model, arena, span, prefix, job)
            captures.append(CaptureKV())
            rows = model.rows(job.token_ids, begin)
            groups.append(RowGroup(span, *rows, observer=captures[-1], first_position=begin))
        model.forward(groups, arena)
    finally:
        for span in spans:
            arena.free(span)
    return [capture.chunk_kv() for capture in captures]


def _lay_out(model: LanguageModel, arena: KVArena, span: Span, prefix: ChunkKV, job: ChunkJob) -> None:
    place_(arena, model.rope, span, 0, prefix)
    at = prefix.num_tokens
    for kv in job.context:
        place_(arena, model.rope, span, at, kv)
        at += kv.num_tokens
