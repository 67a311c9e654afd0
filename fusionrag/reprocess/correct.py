"""Correction of the tokens that are *not* recomputed, by the mean residual of those that are.

Most of what recomputation changes is one offset shared by the tokens of a chunk. So, layer by layer and before that
layer's attention, the mean difference between fresh and stored keys (un-rotated) and values of a chunk's recomputed
tokens is added, per KV head, to the chunk's other tokens – in the request's span only, never in the store (I4). Idea:
AgentKVShift, arXiv 2607.21604.

All recomputed rows of the request must be in the same forward pass, since the mean is over all of them.
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
        selected: torch.Tensor,
        untouched: frozenset[int],
        weight: float,
    ) -> None:
        """untouched: indices of chunks that are exact already (the first chunk, chunks computed in place)."""
        self._arena, self._rope, self._weight = arena, rope, weight
        self._chunks: list[tuple[slice, slice, torch.Tensor]] = []  # (rows of the pass, slots of the chunk, positions)
        for i, segment in enumerate(plan.chunks):
            begin = int(torch.searchsorted(selected, segment.start))
            end = int(torch.searchsorted(selected, segment.stop))
            if end > begin and i not in untouched:
                positions = torch.arange(segment.start, segment.stop, device=selected.device)
                self._chunks.append((slice(begin, end), slice(segment.start, segment.stop), positions))

    def before_write(self, layer: int, group: RowGroup, keys: torch.Tensor, values: torch.Tensor) -> None:
        """The recomputed rows stand first in the pass, before the tail."""
        span_keys, span_values = self._arena.view(layer, group.span)
        scale = self._rope.scaling
        for rows, slots, positions in self._chunks:
            own = group.positions[rows]
            stale_keys = self._rope.shift(span_keys[:, own], -own).float() / scale
            key_residual = (keys[:, rows].float() - stale_keys).mean(1, keepdim=True)  # (G, 1, D)
            value_residual = (values[:, rows].float() - span_values[:, own].float()).mean(1, keepdim=True)
            num_tokens = slots.stop - slots.start
            moved = self._rope.rotate(key_residual.expand(-1, num_tokens, -1), *self._rope.tables(positions))
            span_keys[:, slots] += (self._weight * moved).to(span_keys.dtype)
            span_values[:, slots] += (self._weight * value_residual).to(span_values.dtype)

    def after_write(self, layer: int, group: RowGroup, queries: torch.Tensor) -> None:
        pass
