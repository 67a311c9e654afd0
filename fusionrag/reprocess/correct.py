"""Correction of the tokens that are *not* recomputed, by the mean residual of those that are.

Most of what recomputation changes is one offset shared by the tokens of a chunk. So, layer by layer and before that
layer's attention, the mean difference between fresh and stored keys (un-rotated) and values of a chunk's recomputed
tokens is added, per KV head, to the chunk's other tokens – in the request's span only, never in the store (I4). Idea:
AgentKVShift, arXiv 2607.21604.

All recomputed rows of the request must be in the same forward pass, since the mean is over all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fusionrag.arena import KVArena
from fusionrag.rope import Rope
from fusionrag.types import PromptPlan, RowGroup


@dataclass(frozen=True)
class _Part:
    """One chunk's share: its rows in the pass, its slots in the span, and the rotations of both (tables of Rope)."""

    rows: slice
    slots: slice
    own: torch.Tensor  # (K,) positions of the rows
    back: tuple[torch.Tensor, torch.Tensor]  # (K, rotary_dim / 2) cos and sin that undo the rows' rotation
    forth: tuple[torch.Tensor, torch.Tensor]  # (T, rotary_dim / 2) cos and sin of all slots, times the weight


class MeanResidual:
    """An observer of the recompute pass. `selected`: (K,) positions of recomputed chunk tokens, ascending."""

    def __init__(
        self,
        arena: KVArena,
        rope: Rope,
        plan: PromptPlan,
        selected: torch.Tensor,
        weight: float,
    ) -> None:
        self._arena, self._rope, self._weight = arena, rope, weight
        self._parts: list[_Part] = []
        for segment in plan.chunks:
            begin = int(torch.searchsorted(selected, segment.start))
            end = int(torch.searchsorted(selected, segment.stop))
            if end == begin:
                continue
            own = selected[begin:end]
            back_cos, back_sin = rope.tables(-own)
            cos, sin = rope.tables(torch.arange(segment.start, segment.stop, device=selected.device))
            # tables carry the rope's scaling: stored-frame keys do not, so undoing divides by it twice
            back = back_cos / rope.scaling**2, back_sin / rope.scaling**2
            slots = slice(segment.start, segment.stop)
            self._parts.append(_Part(slice(begin, end), slots, own, back, (weight * cos, weight * sin)))

    def before_write(self, layer: int, group: RowGroup, keys: torch.Tensor, values: torch.Tensor) -> None:
        """The recomputed rows stand first in the pass, before the tail."""
        if layer == 0:  # keys and values of layer 0 are the same in every context
            return
        span_keys, span_values = self._arena.view(layer, group.span)
        for part in self._parts:
            stale_keys = self._rope.rotate(span_keys[:, part.own].float(), *part.back)
            key_residual = (keys[:, part.rows].float() - stale_keys).mean(1, keepdim=True)  # (G, 1, D)
            value_residual = (values[:, part.rows].float() - span_values[:, part.own].float()).mean(1, keepdim=True)
            span_keys[:, part.slots] += self._moved(key_residual, part).to(span_keys.dtype)
            span_values[:, part.slots] += (self._weight * value_residual).to(span_values.dtype)

    def _moved(self, residual: torch.Tensor, part: _Part) -> torch.Tensor:
        """(G, 1, D) in the stored frame → (G, T, D) rotated to each slot's position, times the weight, fp32."""
        rotary_dim = self._rope.rotary_dim
        num_tokens = part.slots.stop - part.slots.start
        moved = self._rope.rotate(residual.expand(-1, num_tokens, -1), *part.forth)
        if rotary_dim < residual.shape[-1]:  # dimensions that are not rotated do not get the weight from the tables
            moved[..., rotary_dim:] *= self._weight
        return moved

    def after_write(self, layer: int, group: RowGroup, queries: torch.Tensor) -> None:
        pass
