"""One request in the engine: what it asked for, its span, its rows still to run, and the receipt that it will get.

Knows nothing of other requests, or of when its rows run. Reading what the device has not computed yet would make the
host wait, so token counts and phases are worked out when the first token is there (`settle`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

import torch

from fusionrag.clock import Mark
from fusionrag.config import ReuseConfig
from fusionrag.kernels.backend import to_device
from fusionrag.layout import Stitched
from fusionrag.model import LanguageModel
from fusionrag.router import Route
from fusionrag.sampling import Sampler, SamplingParams, TextStream
from fusionrag.types import AttentionObserver, KVArrival, PromptPlan, RequestStats, RowGroup, Span

MAX_SEGMENTS = 4096  # of prompts, kept as tensors: turning a tuple into one takes longer than copying it to a GPU


@dataclass(frozen=True)
class EngineRequest:
    """One prompt to answer. `arrival` is `time.perf_counter()` when the request came in, retrieval included."""

    request_id: str
    plan: PromptPlan
    sampling: SamplingParams
    reuse: ReuseConfig
    arrival: float = field(default_factory=time.perf_counter)
    retrieve_ms: float = 0.0
    owner: str = ""  # whose stored KV may be used
    explain: bool = False  # say which tokens were recomputed


@lru_cache(MAX_SEGMENTS)
def _ids(token_ids: tuple[int, ...]) -> torch.Tensor:
    """(T,) int64 on the host; not to be changed."""
    return torch.tensor(token_ids, dtype=torch.int64)


class LiveRequest:
    """A request that owns a span. Mutable, private to the engine and the scheduler."""

    def __init__(self, request: EngineRequest, span: Span, model: LanguageModel) -> None:
        self.request, self.span, self.plan = request, span, request.plan
        self._device = model.device
        self.pending = torch.empty(0, dtype=torch.int64, device=model.device)  # positions still to run, ascending
        self._first_pending: int | None = None  # where the pending positions are known to have no gap
        self.observer: AttentionObserver | None = None
        self._leaving, self._leave_from = 0, 0  # of the pending rows the first, which leave some layer
        self.stitched: Stitched | None = None  # until its tokens are selected
        self.arrival: KVArrival | None = None  # until its first token
        self.is_decoding = False
        self.ran_alone = False  # when it began
        self.num_generated = 0
        self.prefill_begin = Mark.now(model.device)
        self.stats = RequestStats(prompt_tokens=request.plan.num_tokens)
        self.sampler = Sampler(request.sampling, request.plan.token_ids)
        eos_ids = frozenset() if request.sampling.ignore_eos else model.eos_ids
        self.text = TextStream(model.tokenizer, request.sampling.stop, eos_ids)
        self._chosen: tuple[Stitched, torch.Tensor] | None = None  # the selected positions, once they are queued
        self._timed: list[tuple[str, Mark, Mark]] = []  # phases whose time is not read yet

    @cached_property
    def _numbers(self) -> torch.Tensor:
        """Token ids and borders: what the device must be told, in one copy, in front of most of stored KV."""
        room = torch.zeros(self.span.length - self.plan.num_tokens, dtype=torch.int64)
        borders = torch.tensor([s.start for s in self.plan.segments[1:]])
        with torch.inference_mode(False):  # what is generated will be written into it, whoever has it sent
            numbers = torch.cat([*(_ids(s.token_ids) for s in self.plan.segments), room, borders])
            return to_device(numbers, self._device)

    def upload(self) -> None:
        """Sends the device now what it must be told; else that goes when it is first needed."""
        _ = self._numbers

    @property
    def token_ids(self) -> torch.Tensor:
        """(span length,) int64: the prompt, and room for what is generated."""
        return self._numbers[: self.span.length]

    @property
    def borders(self) -> torch.Tensor:
        """(C + 1,) int64: where each chunk begins, and the tail."""
        return self._numbers[self.span.length :]

    @property
    def tail(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and positions of the tail's rows."""
        start, stop = self.plan.tail.start, self.plan.tail.stop
        return self.token_ids[start:stop], torch.arange(start, stop, device=self._device)

    @property
    def num_pending(self) -> int:
        return len(self.pending)

    @property
    def is_atomic(self) -> bool:
        return self.observer is not None

    @property
    def is_filling(self) -> bool:
        return self.stitched is not None

    def take(self, num_rows: int) -> RowGroup:
        """The next `num_rows` pending rows; logits are wanted when they are the last before a token."""
        positions, self.pending = self.pending[:num_rows], self.pending[num_rows:]
        wants_token = not self.is_filling and not len(self.pending)
        ids, first = self.token_ids[positions], self._first_pending
        if first is not None:
            self._first_pending = first + num_rows
        leaving = min(self._leaving, len(positions))
        self._leaving -= leaving
        return RowGroup(
            self.span, ids, positions, int(wants_token), self.observer, self.arrival, first, leaving, self._leave_from
        )

    def queue(
        self, positions: torch.Tensor, first: int | None = None, num_leaving: int = 0, leave_from: int = 0
    ) -> None:
        """positions: (R,) ascending, to be run. first: the first of them, if it is known that there is no gap.

        num_leaving: of them, from the first on, those that are run up to their keys and values of layer `leave_from`.
        """
        self.pending, self._first_pending = positions, first
        self._leaving, self._leave_from = num_leaving, leave_from

    def append(self, token_id: int) -> None:
        """A generated token: the next row to run."""
        position = self.plan.num_tokens + self.num_generated - 1
        self.token_ids[position] = token_id
        self.queue(torch.arange(position, position + 1, device=self.token_ids.device))

    def note(self, **elapsed_ms: float) -> None:
        self.stats = replace(self.stats, phases=self.stats.phases.plus(**elapsed_ms))

    def went(self, route: Route) -> None:
        """The way that it goes to its first token; full prefill unless said otherwise."""
        predicted = route.predicted_ms.get(route.way)
        self.stats = replace(self.stats, way=route.way.value, predicted_ms=predicted)

    def time(self, phase: str, begin: Mark, end: Mark) -> None:
        """Adds the time between two moments to a phase as soon as it can be read."""
        self._timed.append((phase, begin, end))

    def choose(self, stitched: Stitched, selected: torch.Tensor) -> None:
        """selected: (K,) positions that are run again. The counts follow when they can be read."""
        self._chosen = (stitched, selected)

    def settle(self) -> None:
        """Reads what was left to read; the device must be done with all that was queued for this request."""
        for phase, begin, end in self._timed:
            self.note(**{phase: begin.ms_until(end)})
        self._timed.clear()
        if self._chosen is not None:
            stitched, selected = self._chosen
            self.stats = _with_counts(self.stats, self.plan, stitched, selected.cpu(), self.request.explain)
            self._chosen = None
        if self.arrival is not None:
            self.stats = replace(self.stats, arrival_ms=self.arrival.elapsed_ms)
            self.arrival = None


def _with_counts(
    stats: RequestStats, plan: PromptPlan, stitched: Stitched, selected: torch.Tensor, explain: bool
) -> RequestStats:
    """Token counts and receipts. selected: (K,) ascending, on the CPU."""
    positions = selected.tolist()
    bounds = torch.tensor([s.start for s in plan.chunks] + [plan.tail.start])
    per_chunk = torch.searchsorted(selected, bounds).diff().tolist()
    chunks = tuple(replace(r, num_recomputed=per_chunk[i]) for i, r in enumerate(stitched.receipts))
    if explain:
        chunks = tuple(
            replace(r, recomputed=_runs([p - s.start for p in positions if s.start <= p < s.stop]))
            for r, s in zip(chunks, plan.chunks, strict=True)
        )
    return replace(
        stats,
        reused_tokens=plan.prefix.num_tokens + stitched.num_reused - len(selected),
        recomputed_tokens=len(selected),
        computed_tokens=plan.tail.num_tokens + len(stitched.missing),
        chunks=chunks,
    )


def _runs(positions: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Ascending positions as runs [begin, end)."""
    starts = [p for i, p in enumerate(positions) if i == 0 or positions[i - 1] != p - 1]
    ends = [p + 1 for i, p in enumerate(positions) if i + 1 == len(positions) or positions[i + 1] != p + 1]
    return tuple(zip(starts, ends, strict=True))
