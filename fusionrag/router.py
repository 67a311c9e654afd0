"""Which way to the first token is the fastest for one request: full prefill, its exact prefix alone, or reuse as asked.

    full     every token is run
    prefix   the first chunk's KV, exact behind the prefix, is taken; everything behind it is run
    reuse    stored KV of all chunks, then probe and recompute at the asked ratio

Each is predicted from rates that this machine has shown: FLOP/s of dense and of scattered rows, the probe's time for
each token of context, and the time that a token's KV takes from each tier. On a GPU, KV arrives beside the probe; on a
CPU, before it. Knows nothing of how a way is gone.

Invariants: a rate that was never seen predicts nothing, and then the request goes as it was asked for; so it does
unless another way is faster by `MARGIN`, which is more than predictions err by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from fusionrag.cost import PrefillClock, pass_flops
from fusionrag.model import LanguageModel
from fusionrag.types import KVSource, PromptPlan, RequestStats

MARGIN = 0.1
_NEW_SHARE = 0.3  # weight of the latest request in the moving averages
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


class Router:
    """Learns from the requests that it is shown. Belongs to the engine's thread."""

    def __init__(self, model: LanguageModel, clock: PrefillClock) -> None:
        self._model, self._clock = model, clock
        self._is_overlapped = model.device.type == "cuda"
        self._scattered: float | None = None  # FLOP/s of recompute passes
        self._probe_ms: float | None = None  # per token of the prompt
        self._bring_ms: dict[KVSource, float] = {}  # per token

    def choose(
        self,
        plan: PromptPlan,
        sources: Sequence[KVSource | None],
        recompute_ratio: float,
        is_first_exact: bool = True,
    ) -> Route:
        """sources: where each chunk's KV lies now, None where it has none.

        is_first_exact: the first chunk's is raw, so that nothing of it needs to be recomputed.
        """
        predicted: dict[Way, float] = {}
        full = self._clock.prefill_ms(plan.num_tokens)
        reuse = self._reuse_ms(plan, sources, recompute_ratio)
        if full is None or reuse is None:
            return AS_ASKED
        predicted = {Way.REUSE: reuse, Way.FULL: full}
        if is_first_exact and plan.chunks and sources[0] in self._bring_ms:
            first = plan.chunks[0]
            rest = self._clock.range_ms(first.stop, plan.num_tokens)
            if rest is not None:
                predicted[Way.PREFIX] = rest + self._bring_ms[sources[0]] * first.num_tokens
        best = min(predicted, key=lambda way: predicted[way])
        return Route(best if predicted[best] < (1 - MARGIN) * reuse else Way.REUSE, predicted)

    def _reuse_ms(self, plan: PromptPlan, sources: Sequence[KVSource | None], ratio: float) -> float | None:
        if self._scattered is None or any(s is not None and s not in self._bring_ms for s in sources):
            return None
        num_reused = num_missing = 0
        bring_ms = 0.0
        for segment, source in zip(plan.chunks, sources, strict=True):
            if source is None:
                num_missing += segment.num_tokens
            else:
                num_reused += segment.num_tokens
                bring_ms += self._bring_ms[source] * segment.num_tokens
        probe_ms = 0.0 if ratio == 0 or not num_reused else (self._probe_ms or 0.0) * plan.num_tokens
        num_rows = ratio * num_reused + num_missing
        run_ms = self._flops(plan, num_rows) / self._scattered * 1e3
        return (max(bring_ms, probe_ms) if self._is_overlapped else bring_ms + probe_ms) + run_ms

    def _flops(self, plan: PromptPlan, num_rows: float) -> float:
        """Of rows spread over the prompt, and the tail."""
        spread = pass_flops(self._model, 1, plan.num_tokens / 2) * num_rows
        return spread + pass_flops(self._model, plan.tail.num_tokens, plan.num_tokens)

    def observe(self, plan: PromptPlan, stats: RequestStats) -> None:
        """Takes into account a request that reused stored KV and ran alone; its first token is out."""
        phases = stats.phases
        num_rows = stats.recomputed_tokens + stats.computed_tokens - plan.tail.num_tokens
        if phases.recompute_ms > 0:
            self._scattered = _mixed(self._scattered, self._flops(plan, num_rows) / phases.recompute_ms * 1e3)
        if phases.probe_ms > 0:
            waiting_ms = max(0.0, stats.arrival_ms - phases.load_ms - phases.reposition_ms)
            probe_ms = max(phases.probe_ms - waiting_ms, 0.0) if self._is_overlapped else phases.probe_ms
            self._probe_ms = _mixed(self._probe_ms, probe_ms / plan.num_tokens)
        tokens: dict[KVSource, int] = {}
        for chunk in stats.chunks:
            tokens[chunk.source] = tokens.get(chunk.source, 0) + chunk.num_tokens
        brought = {source: n for source, n in tokens.items() if source is not KVSource.COMPUTED}
        for source, num_tokens in brought.items():
            if num_tokens >= _PURE * sum(brought.values()):
                elapsed = phases.load_ms + phases.reposition_ms + stats.arrival_ms
                self._bring_ms[source] = _mixed(self._bring_ms.get(source), elapsed / num_tokens)


def _mixed(old: float | None, new: float) -> float:
    return new if old is None else old + _NEW_SHARE * (new - old)
