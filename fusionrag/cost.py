"""What a forward pass costs, and from that what a full prefill would have taken on this machine.

A pass of R rows over P weight-bearing parameters does `2 P R` FLOPs in its matrix products and `4 L H D` more for every
(row, visible slot) pair in its attention. Divided by the rate at which dense passes have been seen to run here, that
predicts the time of a prefill. Knows nothing of requests or stored KV.

Invariant: the rate comes from measured passes alone; where none has been measured, nothing is predicted.
"""

from __future__ import annotations

import time
from typing import Protocol

import torch

from fusionrag.arena import KVArena
from fusionrag.model import LanguageModel, ModelShape
from fusionrag.types import RowGroup, Span

CALIBRATION_ROWS = {"cpu": 512, "cuda": 4096}  # enough for the rate of long prefills, too few to be noticed at start
_MIN_ROWS = 128  # shorter passes spend their time on overhead, not on FLOPs
_NEW_SHARE = 0.2  # weight of the latest pass in the moving average


class DecoderSize(Protocol):
    """What the cost of a pass depends on; a `LanguageModel` has it, and so has one whose weights nobody has."""

    @property
    def shape(self) -> ModelShape: ...

    @property
    def num_active_parameters(self) -> int: ...

    @property
    def dtype(self) -> torch.dtype: ...


def pass_flops(model: DecoderSize, num_rows: float, mean_visible: float) -> float:
    """FLOPs of `num_rows` rows that see `mean_visible` slots each, on average."""
    shape = model.shape
    attention = 4 * shape.num_layers * shape.num_heads * shape.head_dim * mean_visible
    return (2 * model.num_active_parameters + attention) * num_rows


class PrefillClock:
    """Predicts prefill times from the passes that it is shown. Belongs to the engine's thread."""

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self._flops_per_second: float | None = None

    def flops(self, first: int, stop: int) -> float:
        """FLOPs of the rows at positions [first, stop), each seeing all positions up to its own."""
        return pass_flops(self._model, stop - first, (first + stop + 1) / 2)

    def observe(self, groups: list[RowGroup], elapsed_s: float) -> None:
        """Takes a pass into account if its rows are dense: scattered rows run at another rate."""
        is_dense = all(g.last_position - int(g.positions[0]) + 1 == g.num_rows for g in groups)
        if not is_dense or sum(g.num_rows for g in groups) < _MIN_ROWS or elapsed_s <= 0:
            return
        done = sum(self.flops(int(g.positions[0]), g.last_position + 1) for g in groups)
        self._mix(done / elapsed_s)

    @torch.inference_mode()
    def calibrate(self, arena: KVArena) -> None:
        """Measures one dense pass, after one to warm up. The arena must be idle."""
        num_rows = min(CALIBRATION_ROWS[self._model.device.type], self._model.max_model_len, arena.num_slots)
        group = RowGroup(Span(0, num_rows), *self._model.rows([0] * num_rows), first_position=0)
        for is_measured in (False, True):
            begin = time.perf_counter()
            self._model.forward([group], arena)
            self._model.synchronize()
            if is_measured:
                self.observe([group], time.perf_counter() - begin)

    def prefill_ms(self, num_tokens: int) -> float | None:
        """Milliseconds that a full prefill of so many tokens would take; None before any pass was measured."""
        return self.range_ms(0, num_tokens)

    def range_ms(self, first: int, stop: int) -> float | None:
        """The same for the rows at positions [first, stop) alone."""
        if self._flops_per_second is None:
            return None
        return self.flops(first, stop) / self._flops_per_second * 1e3

    def observe_prefill(self, num_tokens: int, elapsed_ms: float) -> None:
        """Takes a full prefill into account whose time is known by now."""
        if num_tokens >= _MIN_ROWS and elapsed_ms > 0:
            self._mix(self.flops(0, num_tokens) / elapsed_ms * 1e3)

    def _mix(self, rate: float) -> None:
        old = self._flops_per_second
        self._flops_per_second = rate if old is None else old + _NEW_SHARE * (rate - old)
