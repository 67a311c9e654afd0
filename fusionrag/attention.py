"""One forward pass as its attention sees it: whose rows these are, where their keys and values go, what each row sees.

The decoder (`fusionrag.decoder`) calls `write` and then `attend` once a layer. Knows nothing of weights, chunks or of
why a row is run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise

import torch

from fusionrag.arena import KVArena
from fusionrag.kernels.backend import to_device
from fusionrag.kernels.dense import DenseAttention
from fusionrag.kernels.prepare_rows import prepare_rows_
from fusionrag.kernels.row_plan import RequestRows, RowPlan, plan_rows
from fusionrag.kernels.rows_attention import rows_attention
from fusionrag.types import RowGroup


class StopForward(Exception):
    """Raised by an observer that has seen enough layers."""


@dataclass(frozen=True)
class Exit:
    """Rows leave layer `layer` once their keys and values are written: nothing reads what would come out for them.

    rows: those that stay, a slice or (S,) int64; `step` is their pass.
    """

    layer: int
    rows: slice | torch.Tensor
    step: ForwardStep


@dataclass(frozen=True)
class ForwardStep:
    """The rows of all groups, in order: the same for all layers.

    positions, slots: (R,) int64. cos, sin: (R, rotary_dim / 2) fp32. In a pass whose buffers stay, all four may change
    in place; `exit` then says where rows leave, which others work out from their groups.
    """

    groups: tuple[RowGroup, ...]
    arena: KVArena
    positions: torch.Tensor
    slots: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    dense: DenseAttention | None = None  # what serves groups without gaps; None: `rows_attention` as all others
    plans: dict[int | None, RowPlan] = field(default_factory=dict)  # by window, made at the first layer that has it
    exit: Exit | None = None

    def write(self, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Keys, rotated, and values go to their slots; the groups' observers see it. Returns the rotated queries.

        queries (R, H, D), keys and values (R, G, D), all before rotation.
        """
        for group, rows in self.slices():
            if group.arrival is not None:
                group.arrival.wait(layer)
            if group.observer is not None:
                group.observer.before_write(layer, group, keys[rows].transpose(0, 1), values[rows].transpose(0, 1))
        arena_keys, arena_values = self.arena.keys[layer], self.arena.values[layer]
        prepare_rows_(queries, keys, values, self.cos, self.sin, self.slots, arena_keys, arena_values)
        for group, rows in self.slices():
            if group.observer is not None:
                group.observer.after_write(layer, group, queries[rows].transpose(0, 1))
        return queries

    def attend(self, layer: int, queries: torch.Tensor, scaling: float, window: int | None) -> torch.Tensor:
        """queries (R, H, D), rotated. Each row over its own span up to its own position; (R, H, D)."""
        keys, values = self.arena.keys[layer], self.arena.values[layer]
        if self.dense is not None and all(_is_dense(g, self.dense, window) for g in self.groups):
            found = []
            for group, rows in self.slices():
                seen = slice(group.span.start, group.span.start + (group.first_position or 0) + group.num_rows)
                found.append(self.dense(queries[rows], keys[:, seen], values[:, seen], scaling))
            return found[0] if len(found) == 1 else torch.cat(found)
        plan = self.plan(queries.shape[1], window)
        watching = [(g, rows) for g, rows in self.slices() if g.observer is not None and layer in g.observer.sums_at]
        sums = None
        if watching and window is None and plan.tiles is not None:
            sums = torch.empty(queries.shape[:2], dtype=torch.float32, device=queries.device)
        attended = rows_attention(queries, keys, values, plan, scaling, lse=sums)
        for group, rows in watching:
            assert group.observer is not None
            group.observer.after_attention(layer, group, queries[rows], None if sums is None else sums[rows])
        return attended

    def plan(self, num_heads: int, window: int | None) -> RowPlan:
        if window not in self.plans:
            keys = self.arena.keys
            requests = [RequestRows(rows.start, g.num_rows, g.span.start, g.span.length) for g, rows in self.slices()]
            self.plans[window] = plan_rows(
                self.positions, self.slots, requests, num_heads, keys.shape[1], keys.shape[3], keys.dtype, window
            )
        return self.plans[window]

    def is_watched(self, layer: int) -> bool:
        """Whether somebody wants to see this layer's attention."""
        return any(g.observer is not None and layer in g.observer.sums_at for g in self.groups)

    def slices(self) -> Iterator[tuple[RowGroup, slice]]:
        """Each group with the rows of the pass that are its own."""
        begin = 0
        for group in self.groups:
            yield group, slice(begin, begin + group.num_rows)
            begin += group.num_rows

    @cached_property
    def wanted(self) -> slice | torch.Tensor:
        """The rows whose logits are wanted: of each group, its last `num_logits`."""
        return self._index([range(rows.stop - g.num_logits, rows.stop) for g, rows in self.slices() if g.num_logits])

    def exit_from(self, layer: int, is_last: bool) -> Exit | None:
        """Which rows leave this layer behind their keys and values; None where all go on.

        Of the model's last layer those whose logits are not wanted, unless somebody wants to see their attention.
        """
        if self.exit is not None:
            return self.exit if self.exit.layer == layer else None
        if is_last:
            return None if self.is_watched(layer) else Exit(layer, self.wanted, self._of_wanted())
        if not any(g.num_leaving and g.leave_from == layer for g in self.groups):
            return None
        groups, ranges = list[RowGroup](), list[range]()
        for group, own in self.slices():
            num = group.num_leaving if group.leave_from == layer else 0
            if num == group.num_rows:
                continue
            if num:
                group = replace(
                    group,
                    token_ids=group.token_ids[num:],
                    positions=group.positions[num:],
                    observer=None,
                    num_leaving=0,
                )
            groups.append(group)
            ranges.append(range(own.start + num, own.stop))
        rows = self._index(ranges)
        return Exit(layer, rows, self._part(tuple(groups), rows))

    def _of_wanted(self) -> ForwardStep:
        """The same pass with the wanted rows alone; their keys and values are written already."""
        groups = tuple(
            replace(
                g,
                token_ids=g.token_ids[-g.num_logits :],
                positions=g.positions[-g.num_logits :],
                first_position=None if g.first_position is None else g.first_position + g.num_rows - g.num_logits,
            )
            for g in self.groups
            if g.num_logits
        )
        if sum(g.num_rows for g in groups) == len(self.positions):
            return self
        return self._part(groups, self.wanted)

    def _index(self, ranges: Sequence[range]) -> slice | torch.Tensor:
        """These rows of the pass; nothing is sent to the device where they are one run."""
        if all(before.stop == after.start for before, after in pairwise(ranges)):
            return slice(ranges[0].start, ranges[-1].stop) if ranges else slice(0, 0)
        return to_device(torch.cat([torch.arange(r.start, r.stop) for r in ranges]), self.positions.device)

    def _part(self, groups: tuple[RowGroup, ...], rows: slice | torch.Tensor) -> ForwardStep:
        """The pass of these groups, whose rows are `rows` of this one."""
        return ForwardStep(
            groups, self.arena, self.positions[rows], self.slots[rows], self.cos[rows], self.sin[rows], self.dense
        )


def _is_dense(group: RowGroup, dense: DenseAttention, window: int | None) -> bool:
    first = group.first_position
    return first is not None and dense.takes(group.num_rows, first + group.num_rows, window)
