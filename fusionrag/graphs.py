"""Decode passes captured as CUDA graphs: a row a request costs reading weights and KV, not hundreds of launches.

A graph is captured for each of a few batch sizes when it is first needed, and replayed for every later pass of that
many requests or fewer: what changes – tokens, positions, slots – is read on the device from buffers that stay. Knows
nothing of requests.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fusionrag.arena import KVArena
from fusionrag.kernels.backend import to_device
from fusionrag.model import LanguageModel
from fusionrag.types import RowGroup, Span

log = logging.getLogger(__name__)
BATCH_SIZES = (1, 2, 4, 8, 16, 32)
UNUSED = -1  # the slot of a row that only fills up the batch


def why_not_captured(model: LanguageModel) -> str:
    """Why this model decodes without graphs, in words; empty where it has them."""
    if model.device.type != "cuda":
        return f"the model is on the {model.device.type.upper()}"
    return "experts are chosen on the host" if model.is_mixture else ""


@dataclass(frozen=True)
class _Captured:
    """Buffers of one batch size B. token_ids, positions, slots: (B,) int64; logits (B, V) fp32."""

    graph: torch.cuda.CUDAGraph
    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    logits: torch.Tensor


class DecodeGraphs:
    """For one model and one arena, whose memory must stay where it is."""

    def __init__(self, model: LanguageModel, arena: KVArena) -> None:
        self._model, self._arena = model, arena
        self._captured: dict[int, _Captured] = {}
        self._pool: Any = None  # the memory that all graphs share; torch names its type differently in each version
        self._is_on = not why_not_captured(model)

    def run(self, groups: Sequence[RowGroup]) -> torch.Tensor | None:
        """Logits (len(groups), V) of one row a group, or None where no graph serves. Valid until the next run."""
        size = next((b for b in BATCH_SIZES if b >= len(groups)), None)
        if not self._is_on or size is None or not all(_is_decode(g) for g in groups):
            return None
        if size not in self._captured:
            try:
                self._captured[size] = self._capture(size)
            except RuntimeError as error:  # out of memory, or an operation that cannot be captured
                log.warning("decoding without CUDA graphs, slower: %s", error)
                self._is_on = False
                return None
        captured, num = self._captured[size], len(groups)
        starts = to_device(torch.tensor([g.span.start for g in groups]), self._model.device)
        torch.cat([g.token_ids for g in groups], out=captured.token_ids[:num])
        torch.cat([g.positions for g in groups], out=captured.positions[:num])
        torch.add(captured.positions[:num], starts, out=captured.slots[:num])
        captured.positions[num:] = 0
        captured.slots[num:] = UNUSED
        captured.graph.replay()
        return captured.logits[:num]

    def _capture(self, size: int) -> _Captured:
        device = self._model.device
        token_ids, positions = (torch.zeros(size, dtype=torch.int64, device=device) for _ in range(2))
        slots = torch.full((size,), UNUSED, device=device)
        span = Span(0, min(self._model.max_model_len, self._arena.num_slots))  # the longest there can be
        groups = [RowGroup(span, token_ids[i : i + 1], positions[i : i + 1], num_logits=1) for i in range(size)]

        def forward() -> torch.Tensor:
            return self._model.forward_rows(groups, self._arena, token_ids, positions, slots)

        side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):  # compiles what is not compiled, and lets libraries make their workspaces
            forward()
            forward()
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = forward()
        self._pool = graph.pool()
        return _Captured(graph, token_ids, positions, slots, logits)


def _is_decode(group: RowGroup) -> bool:
    return group.num_rows == 1 and group.num_logits == 1 and group.observer is None and group.arrival is None
