"""Which way to the first token is the fastest for one request: full prefill, its exact prefix alone, or reuse as asked.

    full     every token is run
    prefix   the first chunk's KV, exact behind the prefix, is taken; everything behind it is run
    reuse    stored KV of all chunks, then probe and recompute at the asked ratio

Each is predicted from rates that this machine has shown: FLOP/s of dense rows, of scattered rows and of the probe, and
the time that a token's KV takes from each tier. On a GPU, KV arrives beside the probe; on a CPU, before it. Knows
nothing of how a way is gone.

Invariants: a rate that was never seen predicts nothing, and then the request goes as it was asked for; so it does
unless another way is faster by `MARGIN`, which is more than predictions err by. One request that something else slowed
down changes no rate that was seen three times.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from fusionrag.cost import PrefillClock, pass_flops
from fusionrag.model import LanguageModel
from fusionrag.types import KVSource, PromptPlan, RequestStats

MARGIN = 0.1
RETRY_AFTER = 32  # requests in a row that did not go as asked; the next does, for rates that nobody tries never mend
_NUM_RECENT = 5  # requests whose median is a rate
_MIN_ROWS = {"cpu": 128, "cuda": 512}  # of a pass whose time is that of its FLOPs, not that of reading the weights
_PURE = 0.9  # share of the tokens that must come from one tier for the time to be that tier's


class Way(Enum):
    """How a request gets to its first token."""

    REUSE = "reuse"
    PREFIX = "prefix"
    FULL = "full"


@dataclass(frozen=True)
class Route:
    """The way taken, and the milliseconds predicted for each way that could be."""

    way: Way
    predicted_ms: Mapping[Way, float]


AS_ASKED = Route(Way.REUSE, {})


class _Recent:
    """The median of the latest values; None before the first."""

    def __init__(self) -> None:
        self._values: deque[float] = deque(maxlen=_NUM_RECENT)

    def add(self, value: float) -> None:
        self._values.append(value)

    @property
    def median(self) -> float | None:
        return statistics.median(self._values) if self._values else None


class Router:
    """Learns from the requests that it is shown. Belongs to the engine's thread."""

    def __init__(self, model: LanguageModel, clock: PrefillClock) -> None:
        self._model, self._clock = model, clock
        self._is_overlapped = model.device.type == "cuda"
        self._num_to_ignore = 1 if self._is_overlapped else 0  # requests during which kernels are compiled
        self._scattered = _Recent()  # FLOP/s of recompute passes
        self._shortest_ms = _Recent()  # of recompute passes of few rows
        self._probe = _Recent()  # FLOP/s of the tail's rows
        self._bring: dict[KVSource, _Recent] = {}  # milliseconds a token
        self._num_diverted = 0  # requests in a row

    def choose(
        self,
        plan: PromptPlan,
        sources: Sequence[KVSource | None],
        recomputed_share: float,
        is_first_exact: bool = True,
    ) -> Route:
        """sources: where each chunk's KV lies now, None where it has none.

        recomputed_share: of the work of running all reused tokens through all layers.
        is_first_exact: the first chunk's is raw, so that nothing of it needs to be recomputed.
        """
        predicted: dict[Way, float] = {}
        full = self._clock.prefill_ms(plan.num_tokens)
        reuse = self._reuse_ms(plan, sources, recomputed_share)
        if full is None or reuse is None:
            return AS_ASKED
        predicted = {Way.REUSE: reuse, Way.FULL: full}
        if is_first_exact and plan.chunks and (token_ms := self._token_ms(sources[0])) is not None:
            first = plan.chunks[0]
            rest = self._clock.range_ms(first.stop, plan.num_tokens)
            if rest is not None:
                predicted[Way.PREFIX] = rest + token_ms * first.num_tokens
        best = min(predicted, key=lambda way: predicted[way])
        is_diverted = predicted[best] < (1 - MARGIN) * reuse and self._num_diverted < RETRY_AFTER
        self._num_diverted = self._num_diverted + 1 if is_diverted else 0
        return Route(best if is_diverted else Way.REUSE, predicted)

    def _reuse_ms(self, plan: PromptPlan, sources: Sequence[KVSource | None], share: float) -> float | None:
        num_reused = num_missing = 0
        bring_ms = 0.0
        for segment, source in zip(plan.chunks, sources, strict=True):
            if source is None:
                num_missing += segment.num_tokens
                continue
            token_ms = self._token_ms(source)
            if token_ms is None:
                return None
            num_reused += segment.num_tokens
            bring_ms += token_ms * segment.num_tokens
        run_ms = self._run_ms(plan, share * num_reused + num_missing)
        if run_ms is None:
            return None
        probe_ms = self._probe_ms(plan) if share > 0 and num_reused else 0.0
        return (max(bring_ms, probe_ms) if self._is_overlapped else bring_ms + probe_ms) + run_ms

    def _token_ms(self, source: KVSource | None) -> float | None:
        """What a token's KV takes from there; None where that was never seen."""
        return self._bring[source].median if source in self._bring else None

    def _run_ms(self, plan: PromptPlan, num_rows: float) -> float | None:
        rate = self._scattered.median
        return None if rate is None else max(self._flops(plan, num_rows) / rate * 1e3, self._shortest_ms.median or 0.0)

    def _probe_ms(self, plan: PromptPlan) -> float:
        rate = self._probe.median
        return 0.0 if rate is None else pass_flops(self._model, plan.tail.num_tokens, plan.num_tokens) / rate * 1e3

    def _flops(self, plan: PromptPlan, num_rows: float) -> float:
        """Of rows spread over the prompt, and the tail."""
        spread = pass_flops(self._model, 1, plan.num_tokens / 2) * num_rows
        return spread + pass_flops(self._model, plan.tail.num_tokens, plan.num_tokens)

    def observe(self, plan: PromptPlan, stats: RequestStats, recompute_depth: float = 1.0) -> None:
        """Takes into account a request that reused stored KV and ran alone; its first token is out."""
        if self._num_to_ignore:
            self._num_to_ignore -= 1
            return
        phases = stats.phases
        num_rows = recompute_depth * stats.recomputed_tokens + stats.computed_tokens - plan.tail.num_tokens
        if phases.recompute_ms > 0:
            if num_rows >= _MIN_ROWS[self._model.device.type]:
                self._scattered.add(self._flops(plan, num_rows) / phases.recompute_ms * 1e3)
            else:
                self._shortest_ms.add(phases.recompute_ms)
        if phases.probe_ms > 0:
            waiting_ms = max(0.0, stats.arrival_ms - phases.load_ms - phases.reposition_ms) * self._is_overlapped
            probe_ms = max(phases.probe_ms - waiting_ms, 0.1)  # what is left of it is not measured to the last bit
            self._probe.add(pass_flops(self._model, plan.tail.num_tokens, plan.num_tokens) / probe_ms * 1e3)
        self._observe_tiers(stats)

    def _observe_tiers(self, stats: RequestStats) -> None:
        tokens: dict[KVSource, int] = {}
        for chunk in stats.chunks:
            if chunk.source is not KVSource.COMPUTED:
                tokens[chunk.source] = tokens.get(chunk.source, 0) + chunk.num_tokens
        for source, num_tokens in tokens.items():
            if num_tokens >= _PURE * sum(tokens.values()):
                elapsed_ms = stats.phases.load_ms + stats.phases.reposition_ms + stats.arrival_ms
                self._bring.setdefault(source, _Recent()).add(elapsed_ms / num_tokens)
