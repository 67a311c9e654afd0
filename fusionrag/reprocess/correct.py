"""Correction of the tokens that are *not* recomputed, by the mean residual of those that are.

Most of what recomputation changes is one offset shared by the tokens of a chunk. So, layer by layer and before that
layer's attention, the mean difference between fresh and stored keys (un-rotated) and values of a chunk's recomputed
tokens is added, per KV head, to the chunk's other tokens – in the request's span only, never in the store (I4). Idea:
AgentKVShift, arXiv 2607.21604.

All recomputed rows of the request must be in the same forward pass, since the mean is over all of them. Nothing here
reads a value back from the device.
"""

from __future__ import annotations

import torch

from fusionrag.arena import KVArena
from fusionrag.kernels.backend import to_device
from fusionrag.kernels.residual import mean_residual
from fusionrag.kernels.shift import shift_
from fusionrag.rope import Rope
from fusionrag.types import PromptPlan, RowGroup


class MeanResidual:
    """An observer of the recompute pass. `selected`: (K,) positions of recomputed chunk tokens, ascending."""

    def __init__(
        self,
        arena: KVArena,
        rope: Rope,
        plan: PromptPlan,
        chunk_of: torch.Tensor,
        selected: torch.Tensor,
        weight: float,
    ) -> None:
        """chunk_of: (N,) the chunk of each position."""
        self._arena, self._selected, self._weight = arena, selected, weight
        self._first_slot, stop = plan.chunks[0].start, plan.chunks[-1].stop
        self._chunk_of = chunk_of[self._first_slot : stop]
        borders = torch.tensor([s.start for s in plan.chunks] + [stop])
        self._bounds = torch.searchsorted(selected, to_device(borders, selected.device))
        cos, sin = rope.tables(-selected)
        # tables carry the rope's scaling: stored-frame keys do not, so undoing divides by it twice
        self._back = cos / rope.scaling**2, sin / rope.scaling**2
        self._forth = rope.tables(torch.arange(self._first_slot, stop, device=selected.device))

    def before_write(self, layer: int, group: RowGroup, keys: torch.Tensor, values: torch.Tensor) -> None:
        """The recomputed rows stand first in the pass, before the tail."""
        if layer == 0:  # keys and values of layer 0 are the same in every context
            return
        span = self._arena.view(layer, group.span)
        shifts = mean_residual(keys, values, *span, self._selected, self._bounds, *self._back, self._weight)
        shift_(*span, self._first_slot, self._chunk_of, *shifts, *self._forth)

    def after_write(self, layer: int, group: RowGroup, queries: torch.Tensor) -> None:
        pass
