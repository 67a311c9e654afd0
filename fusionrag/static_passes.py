"""A request's probe and its last pass before the first token, in buffers that stay, as CUDA graphs.

At 8K tokens these two passes are some 1,000 kernels, whose launches take longer than the GPU needs for them. Numbers
of rows and of positions are rounded up, so that one graph serves many requests; rows that only fill up are written
nowhere and seen by nobody. A graph is captured behind the request that first had its size, whose own passes were
launched one by one: nobody waits for it.

Passes of more rows than `MAX_ROWS` keep the device busy for longer than launching takes and run as any other.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import partial
from typing import TypeVar, cast

import torch

from fusionrag.arena import KVArena
from fusionrag.attention import Exit, StopForward
from fusionrag.graphs import UNUSED, Buffers, GraphPool, Replay, RowPass, why_not_captured
from fusionrag.kernels.row_plan import RequestRows, plan_rows
from fusionrag.loading import layer_runs
from fusionrag.model import LanguageModel
from fusionrag.reprocess.correct import MeanResidual
from fusionrag.reprocess.probe import AttentionProbe
from fusionrag.row_sizes import RowSizes
from fusionrag.types import AttentionObserver, KVArrival, RowGroup

MAX_ROWS = 2048
MAX_PASSES = 64  # kept, the least recently used out first; a captured one takes a few MiB
MIN_POSITIONS, MIN_CHUNKS = 1024, 16

P = TypeVar("P", bound="_Pass")


class StaticPasses:
    """For one model and one arena, whose memory must stay where it is."""

    def __init__(self, model: LanguageModel, arena: KVArena, pool: GraphPool) -> None:
        self._model, self._arena, self._pool = model, arena, pool
        self._longest = min(model.max_model_len, arena.num_slots)
        self._passes: OrderedDict[Hashable, _Pass] = OrderedDict()
        self._to_capture: list[_Pass] = []
        self._sizes = RowSizes(model, MAX_ROWS)
        self.is_on = not why_not_captured(model)

    def probe(
        self, group: RowGroup, layers: frozenset[int], rows: range, normalize: bool, candidates: torch.Tensor
    ) -> torch.Tensor | None:
        """As `reprocess.probe.AttentionProbe`: (≥ N,) importance, valid until the next pass, or None.

        candidates: (K,) int64 positions.
        """
        if not self._takes(group):
            return None
        return self._pass(_Probe, *self._size(group), layers, normalize).run_for(group, rows, candidates)

    def recompute(self, group: RowGroup) -> torch.Tensor | None:
        """Logits (1, V) of the group's last row, valid until the next pass; None where it must run as any other."""
        corrected = group.observer
        if not self._takes(group) or group.num_logits != 1 or not isinstance(corrected, MeanResidual | None):
            return None
        num_chunks = 0 if corrected is None else _power_of_two(len(corrected.borders) - 1, MIN_CHUNKS)
        weight = 0.0 if corrected is None else corrected.weight
        stay = (0, 0)
        if group.num_leaving:
            stay = self._sizes.at_least(group.num_rows - group.num_leaving), group.leave_from
        return self._pass(_Recompute, *self._size(group), num_chunks, weight, *stay).run_for(group)

    def capture(self) -> None:
        """Captures what ran for the first time since the last call."""
        while self._to_capture and self._pool.is_on:
            self._to_capture.pop().replay.capture()

    def _takes(self, group: RowGroup) -> bool:
        is_known = group.first_position is None and 0 < group.num_rows <= MAX_ROWS
        return self.is_on and self._pool.is_on and is_known

    def _size(self, group: RowGroup) -> tuple[int, int]:
        """Rows and positions of the buffers."""
        return self._sizes.at_least(group.num_rows), min(_power_of_two(group.span.length, MIN_POSITIONS), self._longest)

    def _pass(self, kind: type[P], *sizes: Hashable) -> P:
        """The one of this kind and these sizes, made if it is not there."""
        key, make = (kind, *sizes), cast("Callable[..., P]", kind)
        found = self._passes.get(key)
        if found is None:
            found = self._passes[key] = make(self._model, self._arena, self._pool, *sizes)
            self._to_capture.append(found)
        self._passes.move_to_end(key)
        while len(self._passes) > MAX_PASSES:
            self._passes.popitem(last=False)
        assert isinstance(found, kind)
        return found


class _Pass:
    """One group's rows in buffers."""

    def __init__(
        self,
        model: LanguageModel,
        arena: KVArena,
        pool: GraphPool,
        buffers: Buffers,
        num_positions: int,
        observer: AttentionObserver | None,
        num_layers: int,
        exit: Exit | None = None,
    ) -> None:
        self.buffers = buffers
        self.rows = RowPass(model, arena, buffers, num_positions, observer, exit)
        self._layers = layer_runs(num_layers)
        self.replay = Replay([partial(self._piece, layers) for layers in self._layers], pool)

    def _piece(self, layers: range) -> None:
        self.rows.run_layers(layers)

    def _fill(self, group: RowGroup) -> None:
        self.buffers.start.fill_(group.span.start)
        self.buffers.token_ids[: group.num_rows] = group.token_ids
        _place(self.buffers, group.positions, group.span.start)

    def _run(self, arrival: KVArrival | None) -> None:
        if arrival is None:
            self.replay.run()
        else:
            self.replay.run(lambda piece: arrival.wait(self._layers[piece].start))


class _Probe(_Pass):
    """The tail's rows, up to the highest probed layer."""

    def __init__(
        self,
        model: LanguageModel,
        arena: KVArena,
        pool: GraphPool,
        num_rows: int,
        num_positions: int,
        layers: frozenset[int],
        normalize: bool,
    ) -> None:
        shape, buffers = model.shape, Buffers(num_rows, model.device)
        whole = [RequestRows(0, num_rows, 0, num_positions)]
        sizes = shape.num_heads, shape.num_kv_heads, shape.head_dim
        plan = plan_rows(buffers.positions, buffers.slots, whole, *sizes, model.dtype)
        self._is_candidate = torch.zeros(num_positions, device=model.device)
        self._hidden_rows = torch.zeros(num_rows, device=model.device)
        self._probe = AttentionProbe(
            arena, layers, range(num_rows), self._is_candidate, normalize, self._hidden_rows, plan
        )
        super().__init__(model, arena, pool, buffers, num_positions, self._probe, max(layers) + 1)

    def _piece(self, layers: range) -> None:
        if layers.start == 0:
            self._probe.importance.zero_()
        with contextlib.suppress(StopForward):
            self.rows.run_layers(layers)

    def run_for(self, group: RowGroup, rows: range, candidates: torch.Tensor) -> torch.Tensor:
        self._fill(group)
        self._hidden_rows.fill_(float("inf"))
        self._hidden_rows[rows.start : rows.stop] = 0
        self._is_candidate.zero_().index_fill_(0, candidates, 1.0)
        self._run(group.arrival)
        return self._probe.importance


class _Recompute(_Pass):
    """Selected rows and the tail, corrected where a weight is given."""

    def __init__(
        self,
        model: LanguageModel,
        arena: KVArena,
        pool: GraphPool,
        num_rows: int,
        num_positions: int,
        num_chunks: int,
        weight: float,
        num_staying: int,
        leave_from: int,
    ) -> None:
        """num_staying: room for the rows that go on where the others leave layer `leave_from`; 0: all go on."""
        device, buffers = model.device, Buffers(num_rows, model.device)
        self._correction = None
        if num_chunks:
            borders = torch.zeros(num_chunks + 1, dtype=torch.int64, device=device)
            self._correction = MeanResidual(arena, model.rope, num_positions, borders, weight)
        self._last = Buffers(1, device)
        self._wanted = torch.zeros(1, dtype=torch.int64, device=device)
        num_layers, last = model.shape.num_layers, RowPass(model, arena, self._last, num_positions)
        exit = Exit(num_layers - 1, self._wanted, last.step)
        self._stay = Buffers(num_staying, device)
        self._stay_rows = torch.zeros_like(self._stay.positions)
        self._from_0 = torch.arange(num_staying, device=device)
        if num_staying:
            tail = RowPass(model, arena, self._stay, num_positions, exit=exit)
            exit = Exit(leave_from, self._stay_rows, tail.step)
        super().__init__(model, arena, pool, buffers, num_positions, self._correction, num_layers, exit)

    def run_for(self, group: RowGroup) -> torch.Tensor:
        self._fill(group)
        num_leaving = group.num_leaving
        self._wanted.fill_(group.num_rows - num_leaving - 1)
        if num_leaving:
            self._stay.start.fill_(group.span.start)
            _place(self._stay, group.positions[num_leaving:], group.span.start)
            torch.clamp(self._from_0 + num_leaving, max=group.num_rows - 1, out=self._stay_rows)
        self._last.positions.copy_(group.positions[-1:])
        torch.add(group.positions[-1:], group.span.start, out=self._last.slots)
        own, asked = self._correction, group.observer
        if own is not None:
            assert isinstance(asked, MeanResidual)
            own.borders[: len(asked.borders)] = asked.borders
            own.borders[len(asked.borders) :] = asked.borders[-1]
        self._run(group.arrival)
        assert self.rows.logits is not None
        return self.rows.logits


def _place(buffers: Buffers, positions: torch.Tensor, start: int) -> None:
    """positions: (R,), of the first R rows of the buffers; the others only fill up."""
    num = len(positions)
    buffers.positions[:num] = positions
    buffers.positions[num:] = positions[-1]
    torch.add(positions, start, out=buffers.slots[:num])
    buffers.slots[num:] = UNUSED


def _power_of_two(n: int, at_least: int) -> int:
    return max(at_least, 1 << (n - 1).bit_length())
