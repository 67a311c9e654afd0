"""Passes captured as CUDA graphs: they cost what the device does for them, not hundreds of launches by the host.

What changes from pass to pass – tokens, positions, slots – is read on the device from buffers that stay, so a graph
serves every pass of its size. Knows nothing of requests.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fusionrag.arena import KVArena
from fusionrag.attention import Exit, ForwardStep
from fusionrag.kernels.backend import to_device
from fusionrag.model import LanguageModel
from fusionrag.types import AttentionObserver, RowGroup, Span

log = logging.getLogger(__name__)
BATCH_SIZES = (1, 2, 4, 8, 16, 32)
UNUSED = -1  # the slot of a row that only fills up a pass


def why_not_captured(model: LanguageModel) -> str:
    """Why this model runs without graphs, in words; empty where it has them."""
    if model.device.type != "cuda":
        return f"the model is on the {model.device.type.upper()}"
    return "experts are chosen on the host" if model.is_mixture else ""


class GraphPool:
    """The memory that all graphs of one model share; they run one after the other."""

    def __init__(self) -> None:
        self.handle: Any = None  # torch names its type differently in each version
        self.is_on = True


class Replay:
    """Pieces of a pass that run one after the other: launched one by one at first, as CUDA graphs once captured.

    A piece takes nothing and returns nothing; what it reads and writes stays where it is.
    """

    def __init__(self, pieces: Sequence[Callable[[], None]], pool: GraphPool) -> None:
        self._pieces, self._pool = pieces, pool
        self._graphs: list[torch.cuda.CUDAGraph] = []

    @property
    def is_captured(self) -> bool:
        return bool(self._graphs)

    @torch.inference_mode()
    def run(self, before: Callable[[int], None] | None = None) -> None:
        """before: called with the number of each piece before it is queued."""
        run = [graph.replay for graph in self._graphs] or self._pieces
        for i, piece in enumerate(run):
            if before is not None:
                before(i)
            piece()

    @torch.inference_mode()
    def capture(self) -> None:
        """Must have run before: then everything is compiled, and libraries have their workspaces."""
        graphs = []
        try:
            for piece in self._pieces:
                graph = torch.cuda.CUDAGraph()
                # other threads may allocate meanwhile: they read files into page-locked memory
                with torch.cuda.graph(graph, pool=self._pool.handle, capture_error_mode="thread_local"):
                    piece()
                self._pool.handle = graph.pool()
                graphs.append(graph)
        except RuntimeError as error:  # out of memory, or an operation that cannot be captured
            log.warning("passes run without CUDA graphs, slower: %s", error)
            self._pool.is_on = False
            return
        self._graphs = graphs


class Buffers:
    """The rows of a pass of fixed size, in place. token_ids, positions, slots: (R,) int64.

    start: (1,) int64, of the span, where all rows are one group's.
    """

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self.token_ids, self.positions = (torch.zeros(num_rows, dtype=torch.int64, device=device) for _ in range(2))
        self.slots = torch.full((num_rows,), UNUSED, device=device)
        self.start = torch.zeros(1, dtype=torch.int64, device=device)


class RowPass:
    """A pass over buffers: the groups' spans are as long as they can get, since plans are made for the longest."""

    def __init__(
        self,
        model: LanguageModel,
        arena: KVArena,
        buffers: Buffers,
        span_length: int,
        observer: AttentionObserver | None = None,
        exit: Exit | None = None,
    ) -> None:
        """One group of all rows where some leave or an observer looks on; else a group a row.

        exit: where; the pass of those that stay is over buffers, too.
        """
        self._model, self._token_ids = model, buffers.token_ids
        span, is_one = Span(0, span_length), observer is not None or exit is not None
        rows = [slice(None)] if is_one else [slice(i, i + 1) for i in range(len(buffers.token_ids))]
        start = buffers.start if is_one else None
        groups = [
            RowGroup(span, buffers.token_ids[r], buffers.positions[r], 1, observer=observer, start_on_device=start)
            for r in rows
        ]
        self.step = ForwardStep(
            tuple(groups), arena, buffers.positions, buffers.slots, *model.rope.tables(buffers.positions), exit=exit
        )
        self._hidden: torch.Tensor | None = None
        self.logits: torch.Tensor | None = None

    def _update_tables(self, step: ForwardStep) -> None:
        """To the positions that now stand in the buffers, also of rows that are still to write where others leave."""
        for table, fresh in zip((step.cos, step.sin), self._model.rope.tables(step.positions), strict=True):
            table.copy_(fresh)
        if step.exit is not None and step.exit.layer + 1 < self._model.shape.num_layers:
            self._update_tables(step.exit.step)

    def run_layers(self, layers: range) -> None:
        """The first of them embeds the tokens, the last gives the logits."""
        model, step = self._model, self.step
        if layers.start == 0:
            self._update_tables(step)
            self._hidden = model.embed(self._token_ids)
        while step.exit is not None and layers.start > step.exit.layer:
            step = step.exit.step
        assert self._hidden is not None
        self._hidden = model.run_layers(self._hidden, step, layers)
        if layers.stop == model.shape.num_layers:
            self.logits = model.logits(self._hidden)


class DecodeGraphs:
    """Decode passes, one row a request, for one model and one arena, whose memory must stay where it is."""

    def __init__(self, model: LanguageModel, arena: KVArena, pool: GraphPool | None = None) -> None:
        self._model, self._arena, self._pool = model, arena, pool or GraphPool()
        self._passes: dict[int, tuple[Buffers, RowPass, Replay]] = {}
        self._is_on = not why_not_captured(model)

    def run(self, groups: Sequence[RowGroup]) -> torch.Tensor | None:
        """Logits (len(groups), V) of one row a group, or None where no graph serves. Valid until the next run."""
        size = next((b for b in BATCH_SIZES if b >= len(groups)), None)
        if not (self._is_on and self._pool.is_on) or size is None or not all(_is_decode(g) for g in groups):
            return None
        if size not in self._passes:
            self._passes[size] = self._prepare(size)
        buffers, row_pass, replay = self._passes[size]
        num = len(groups)
        starts = to_device(torch.tensor([g.span.start for g in groups]), self._model.device)
        torch.cat([g.token_ids for g in groups], out=buffers.token_ids[:num])
        torch.cat([g.positions for g in groups], out=buffers.positions[:num])
        torch.add(buffers.positions[:num], starts, out=buffers.slots[:num])
        buffers.positions[num:] = 0
        buffers.slots[num:] = UNUSED
        replay.run()
        logits = row_pass.logits
        assert logits is not None
        if not replay.is_captured:
            replay.capture()  # its logits are elsewhere, and not computed yet
        return logits[:num]

    def _prepare(self, size: int) -> tuple[Buffers, RowPass, Replay]:
        buffers = Buffers(size, self._model.device)
        longest = min(self._model.max_model_len, self._arena.num_slots)
        row_pass = RowPass(self._model, self._arena, buffers, longest)
        every = range(self._model.shape.num_layers)
        return buffers, row_pass, Replay([lambda: row_pass.run_layers(every)], self._pool)


def _is_decode(group: RowGroup) -> bool:
    return group.num_rows == 1 and group.num_logits == 1 and group.observer is None and group.arrival is None
