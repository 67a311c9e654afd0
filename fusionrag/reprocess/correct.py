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
from fusionrag.kernels.residual import mean_residual
from fusionrag.kernels.shift import shift_
from fusionrag.rope import Rope
from fusionrag.types import AttentionObserver, RowGroup


class MeanResidual(AttentionObserver):
    """An observer of the recompute pass, whose recomputed rows stand first, in front of the tail.

    borders: (C + 1,) int64, where each chunk begins and the last one ends; there is no gap between them, and one may be
    empty. May change in place before the pass.
    """

    def __init__(self, arena: KVArena, rope: Rope, num_tokens: int, borders: torch.Tensor, weight: float) -> None:
        self.borders, self.weight = borders, weight
        self._arena, self._rope, self._num_tokens = arena, rope, num_tokens

    def before_write(self, layer: int, group: RowGroup, keys: torch.Tensor, values: torch.Tensor) -> None:
        if layer == 0:  # keys and values of layer 0 are the same in every context
            self._look_at(group)
            return
        arena = self._arena.keys[layer], self._arena.values[layer]
        shifts = mean_residual(keys, values, *arena, self._slots, self._bounds, *self._back, self.weight)
        shift_(*arena, self._first_slot, self._chunk_of, *shifts, *self._forth)

    def _look_at(self, group: RowGroup) -> None:
        """What is the same for all layers."""
        positions = group.positions
        self._first_slot = group.first_slot
        self._slots = positions + self._first_slot
        self._bounds = torch.searchsorted(positions, self.borders)  # the tail's rows lie behind all borders
        cos, sin = self._rope.tables(-positions)
        # tables carry the rope's scaling: stored-frame keys do not, so undoing divides by it twice
        self._back = cos / self._rope.scaling**2, sin / self._rope.scaling**2
        tokens = torch.arange(self._num_tokens, device=positions.device)
        self._chunk_of = torch.searchsorted(self.borders, tokens, right=True) - 1  # -1 in front of all chunks
        self._chunk_of.masked_fill_(tokens >= self.borders[-1], -1)
        self._forth = self._rope.tables(tokens)
