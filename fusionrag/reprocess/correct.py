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
        self._arena, self._rope, self._weight, self._selected = arena, rope, weight, selected
        self._slots = slice(plan.chunks[0].start, plan.chunks[-1].stop)
        self._chunk_of_slot = chunk_of[self._slots]
        belongs = torch.arange(len(plan.chunks), device=selected.device)[:, None] == chunk_of[selected]
        self._mean = belongs / belongs.sum(1, keepdim=True).clamp(min=1)  # (C, K): what it is multiplied with, averaged
        cos, sin = rope.tables(-selected)
        # tables carry the rope's scaling: stored-frame keys do not, so undoing divides by it twice
        self._back = cos / rope.scaling**2, sin / rope.scaling**2
        self._forth = rope.tables(torch.arange(self._slots.start, self._slots.stop, device=selected.device))

    def before_write(self, layer: int, group: RowGroup, keys: torch.Tensor, values: torch.Tensor) -> None:
        """The recomputed rows stand first in the pass, before the tail."""
        if layer == 0:  # keys and values of layer 0 are the same in every context
            return
        num_selected = len(self._selected)
        span_keys, span_values = self._arena.view(layer, group.span)
        stale_keys = self._rope.rotate(span_keys[:, self._selected].float(), *self._back)
        moved = self._shared(keys[:, :num_selected].float() - stale_keys)  # still in the stored frame
        span_keys[:, self._slots] += self._rope.rotate(moved, *self._forth).to(span_keys.dtype)
        residual = values[:, :num_selected].float() - span_values[:, self._selected].float()
        span_values[:, self._slots] += self._shared(residual).to(span_values.dtype)

    def _shared(self, residual: torch.Tensor) -> torch.Tensor:
        """(G, K, D) of the recomputed tokens → (G, T, D) of all chunk slots: their chunk's mean, times the weight."""
        mean = torch.matmul(self._mean, residual) * self._weight  # (G, C, D); a product: sums in a fixed order
        return mean[:, self._chunk_of_slot]

    def after_write(self, layer: int, group: RowGroup, queries: torch.Tensor) -> None:
        pass
