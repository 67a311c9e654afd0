"""How many rows a pass of fixed size should have: the size, not much larger than what is asked for, that is fastest.

The matrix library chooses a kernel by the shape, and its choices are uneven: of Qwen2.5-7B's products on an H100, 1,216
rows took 14 % longer than 1,232 (docs/performance.md). So a layer's products are timed once at every size. Knows
nothing of requests.
"""

from __future__ import annotations

from functools import cached_property
from itertools import pairwise

import torch

from fusionrag.model import LanguageModel

STEP = 16
FIRST_TIMED = 128  # fewer rows take as long as reading the weights does, whatever their number
SLACK = 64  # rows that may be added
REPEATS = 3


class RowSizes:
    """For one model. Sizes go up to `largest`, which is a multiple of `STEP`."""

    def __init__(self, model: LanguageModel, largest: int) -> None:
        self._model, self._largest = model, largest

    def at_least(self, num_rows: int) -> int:
        """A multiple of `STEP`. num_rows: at most `largest`."""
        least = -(-num_rows // STEP) * STEP
        if self._model.device.type != "cuda" or least < FIRST_TIMED:
            return least
        sizes = range(least, min(least + SLACK, self._largest) + 1, STEP)
        return min(sizes, key=lambda size: self._elapsed_ms[size])

    @cached_property
    @torch.inference_mode()
    def _elapsed_ms(self) -> dict[int, float]:
        """Of one layer's products, by the number of rows."""
        return {size: self._time(size) for size in range(FIRST_TIMED, self._largest + 1, STEP)}

    def _time(self, num_rows: int) -> float:
        run = self._model.layer_on_noise(num_rows)
        run()  # the library chooses
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(REPEATS + 1)]  # type: ignore[no-untyped-call]
        marks[0].record()
        for mark in marks[1:]:
            run()
            mark.record()
        marks[-1].synchronize()
        return min(float(begin.elapsed_time(end)) for begin, end in pairwise(marks))
