"""The one hook into transformers: an attention function that reads and writes the arena.

Every supported model calls its attention through `AttentionInterface`, with keyword arguments passed down from
`model(...)`. We register a function under the name `fusionrag`, switch the model's rotary module off (so that queries
and keys arrive unrotated), and pass a `ForwardStep` down. No model file is forked.

The mask function must be registered as well: without it transformers silently builds none for a name that it does
not know, with it we say so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from fusionrag.arena import KVArena
from fusionrag.kernels.row_plan import RequestRows, RowPlan, plan_rows
from fusionrag.kernels.rows_attention import rows_attention
from fusionrag.rope import Rope
from fusionrag.types import RowGroup

IMPLEMENTATION = "fusionrag"


@dataclass(frozen=True)
class ForwardStep:
    """What the hook needs during one forward pass: whose rows these are, and where keys and values go.

    cos, sin: (R, rotary_dim / 2) fp32 of all rows' positions, computed once for all layers.
    """

    groups: tuple[RowGroup, ...]
    arena: KVArena
    rope: Rope
    cos: torch.Tensor
    sin: torch.Tensor

    plans: dict[int | None, RowPlan] = field(default_factory=dict)

    def plan(self, num_heads: int, window: int | None) -> RowPlan:
        """The attention plan of all rows, made at the first layer that has this window and kept for the others."""
        if window not in self.plans:
            groups, keys = self.groups, self.arena.keys
            positions = torch.cat([g.positions for g in groups])
            slots = torch.cat([g.positions + g.span.start for g in groups])
            requests = [RequestRows(rows.start, g.num_rows, g.span.start, g.span.length) for g, rows in self.slices()]
            self.plans[window] = plan_rows(
                positions, slots, requests, num_heads, keys.shape[1], keys.shape[3], keys.dtype, window
            )
        return self.plans[window]

    def slices(self) -> Iterator[tuple[RowGroup, slice]]:
        """Each group with the rows of the pass that are its own."""
        begin = 0
        for group in self.groups:
            yield group, slice(begin, begin + group.num_rows)
            begin += group.num_rows


class StopForward(Exception):
    """Raised by an observer that has seen enough layers."""


def fusionrag_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    sliding_window: int | None = None,
    forward_step: ForwardStep | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """query (1, H, R, D), key and value (1, G, R, D), all unrotated. Returns ((1, R, H, D), None)."""
    assert forward_step is not None and attention_mask is None
    layer: int = module.layer_idx  # type: ignore[assignment]
    step, queries, keys, values = forward_step, query[0], key[0], value[0]
    rotated_queries = step.rope.rotate(queries, step.cos, step.sin)
    rotated_keys = step.rope.rotate(keys, step.cos, step.sin)
    for group, rows in step.slices():
        observer = group.observer
        if observer is not None:
            observer.before_write(layer, group, keys[:, rows], values[:, rows])
        span_keys, span_values = step.arena.view(layer, group.span)
        span_keys.index_copy_(1, group.positions, rotated_keys[:, rows])
        span_values.index_copy_(1, group.positions, values[:, rows])
        if observer is not None:
            observer.after_write(layer, group, rotated_queries[:, rows])
    plan = step.plan(queries.shape[0], sliding_window)
    arena = step.arena
    out = rows_attention(rotated_queries.transpose(0, 1), arena.keys[layer], arena.values[layer], plan, scaling)
    return out[None], None


def _no_mask(*_: Any, **__: Any) -> None:
    """Causality is by position and decided in the hook."""
    return None


def register() -> None:
    """Makes `attn_implementation="fusionrag"` known to transformers. Idempotent."""
    AttentionInterface.register(IMPLEMENTATION, fusionrag_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, _no_mask)
