"""CacheBlend's gradual filtering (arXiv 2405.16444 §4.3): fewer tokens are recomputed the deeper the layer.

The recompute pass starts with `START` times the budget, chosen by their deviation at layer 1. At every further layer
the rows still kept are ranked by how far their fresh keys and values are from the stored ones, and the last ones are
dropped: from there on all rows see their stored keys and values again, so the result is that of a pass without them.
The rows kept fall linearly to `STOP` times the budget, so that the mean over the layers is the budget.

A dropped row is still run, since the rows of a pass do not change: quality is the paper's, time is not below it.
"""

from __future__ import annotations

import torch

from fusionrag.arena import KVArena
from fusionrag.rope import Rope
from fusionrag.types import AttentionObserver, RowGroup

START, STOP = 1.5, 0.5


class GradualFilter(AttentionObserver):
    """An observer of the recompute pass. `selected`: (M,) positions that stand first in the pass, ascending."""

    def __init__(self, arena: KVArena, rope: Rope, selected: torch.Tensor, num_layers: int) -> None:
        self._arena, self._rope, self._selected = arena, rope, selected
        self._num_layers = num_layers
        self._kept = torch.ones(len(selected), dtype=torch.bool, device=selected.device)
        self._stored: tuple[torch.Tensor, torch.Tensor] | None = None
        self._tables = rope.tables(selected)

    def num_kept(self, layer: int) -> int:
        """Rows that stay fresh at `layer` (from 1 on), of the M that the pass starts with."""
        depth = (layer - 1) / max(1, self._num_layers - 2)
        return max(1, round(len(self._selected) * (START + depth * (STOP - START)) / START))

    def before_write(self, layer: int, group: RowGroup, keys: torch.Tensor, values: torch.Tensor) -> None:
        if layer == 0:  # keys and values of layer 0 are the same in every context
            return
        rows = len(self._selected)
        span_keys, span_values = self._arena.view(layer, group.span)
        self._stored = span_keys[:, self._selected], span_values[:, self._selected]
        fresh = self._rope.rotate(keys[:, :rows], *self._tables)
        deviation = (fresh - self._stored[0]).float().pow(2) + (values[:, :rows] - self._stored[1]).float().pow(2)
        ranked = deviation.sum((0, 2)).masked_fill(~self._kept, -1.0).sort(descending=True, stable=True).indices
        self._kept = torch.zeros_like(self._kept)
        self._kept[ranked[: self.num_kept(layer)]] = True

    def after_write(self, layer: int, group: RowGroup, queries: torch.Tensor) -> None:
        """Puts back what dropped rows have overwritten, before the attention of this layer looks."""
        del queries
        if self._stored is None:
            return
        dropped = ~self._kept
        span_keys, span_values = self._arena.view(layer, group.span)
        span_keys[:, self._selected[dropped]] = self._stored[0][:, dropped]
        span_values[:, self._selected[dropped]] = self._stored[1][:, dropped]
