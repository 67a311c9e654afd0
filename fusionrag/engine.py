"""The engine: the whole path of a request, from a prompt plan to tokens. Owns the arena; belongs to one thread.

A request's life (each step advances every live request by its share of one forward pass):

    waiting     submitted, no span yet
    filling     stored KV is stitched in; chunks without one are being computed in place
    prefilling  tokens are selected; selected rows and the tail are being run
    decoding    one row a step

Knows nothing of retrieval, HTTP or files.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from fusionrag.clock import Mark
from fusionrag.config import EngineConfig
from fusionrag.cost import PrefillClock
from fusionrag.errors import FusionRAGError, PromptTooLong, QueueFull
from fusionrag.graphs import DecodeGraphs, GraphPool
from fusionrag.layout import Naming, compute_prefix, naming, plan_candidates, stitch_
from fusionrag.live_request import EngineRequest, LiveRequest
from fusionrag.loading import make_loader
from fusionrag.model import LanguageModel
from fusionrag.reprocess.probe import ScoreInputs
from fusionrag.reprocess.recompute import recompute_observer, recompute_positions
from fusionrag.reprocess.select import choose
from fusionrag.router import AS_ASKED, Router, Way
from fusionrag.scheduler import Share, pack
from fusionrag.static_passes import StaticPasses
from fusionrag.stitch import rotated
from fusionrag.store.base import KVStore
from fusionrag.types import (
    ChunkKV,
    FinishReason,
    RequestStats,
    RowGroup,
    Span,
    TokenEvent,
)

log = logging.getLogger(__name__)
MAX_FAILED_PASSES = 3  # in a row; then the device is broken, not a request
MAX_ROWS_ALONE = 16384  # of one pass of a request that runs alone; bounds the activations


@dataclass(frozen=True)
class EngineLoad:
    """How busy the engine is."""

    num_running: int
    num_waiting: int
    arena_tokens: int
    arena_used_tokens: int


class Engine:
    """Continuous batching over one model, one arena and one store. Not thread-safe: one thread calls it."""

    def __init__(
        self,
        model: LanguageModel,
        store: KVStore,
        config: EngineConfig,
        kv_codec: str = "none",
        device_tier_bytes: int = 0,
    ) -> None:
        self.model, self.store, self.config = model, store, config
        self._loader = make_loader(model, store, device_tier_bytes)
        self.arena = model.new_arena(config.num_slots(model.max_model_len))
        pool = GraphPool()
        self._graphs, self._passes = DecodeGraphs(model, self.arena, pool), StaticPasses(model, self.arena, pool)
        self._kv_codec = kv_codec
        self._clock = PrefillClock(model)
        self._router = Router(model, self._clock)
        self._prefixes: dict[tuple[int, ...], tuple[Naming, ChunkKV, ChunkKV]] = {}
        self._waiting: deque[EngineRequest] = deque()
        self._live: list[LiveRequest] = []
        self._num_failed = 0  # passes in a row

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._live)

    @property
    def load(self) -> EngineLoad:
        slots = self.arena.num_slots
        return EngineLoad(len(self._live), len(self._waiting), slots, slots - self.arena.num_free)

    def prefix(self, prefix_ids: tuple[int, ...]) -> tuple[Naming, ChunkKV]:
        """The naming of the operator's stored KV behind this prefix, and the prefix's own KV, computed once."""
        return self._prefix(prefix_ids)[:2]

    def _prefix(self, prefix_ids: tuple[int, ...]) -> tuple[Naming, ChunkKV, ChunkKV]:
        """The same, and the prefix's KV as it stands in every request's span: rotated."""
        if prefix_ids not in self._prefixes:
            names, kv = naming(self.model, self._kv_codec, prefix_ids), compute_prefix(self.model, prefix_ids)
            self._prefixes[prefix_ids] = names, kv, rotated(self.model.rope, kv)
        return self._prefixes[prefix_ids]

    def calibrate(self) -> None:
        """Measures this machine, so that the time of a full prefill can be predicted from the first request on."""
        assert not self.has_work
        self._clock.calibrate(self.arena)

    @contextmanager
    def rehearsing(self, store: KVStore) -> Iterator[None]:
        """Until it ends, requests find their KV in `store` alone, and nothing is learned from them."""
        assert not self.has_work
        own = self.store, self._loader, self._router
        self.store, self._loader = store, make_loader(self.model, store, device_tier_bytes=0)
        self._router = Router(self.model, self._clock)
        try:
            yield
        finally:
            self.store, self._loader, self._router = own

    def submit(self, request: EngineRequest) -> None:
        """Queues a request. Raises PromptTooLong or QueueFull; nothing is kept then."""
        needed, sampling = request.plan.num_tokens + request.sampling.max_tokens, request.sampling
        limit = min(self.model.max_model_len, self.arena.num_slots)
        if needed > limit:
            raise PromptTooLong(
                f"the prompt has {request.plan.num_tokens} tokens and max_tokens is {sampling.max_tokens}: together "
                f"{needed}, but at most {limit} fit; ask for fewer passages or a shorter answer",
                "max_tokens" if request.plan.num_tokens < limit else "messages",
            )
        if len(self._waiting) + len(self._live) >= self.config.max_queue + self.config.max_num_requests:
            raise QueueFull(f"{len(self._waiting)} requests are waiting already (max_queue); try again later")
        self._waiting.append(request)

    def cancel(self, request_id: str) -> None:
        """Forgets a request and frees its slots at once. An unknown id has no effect."""
        self._waiting = deque(r for r in self._waiting if r.request_id != request_id)
        for live in [live for live in self._live if live.request.request_id == request_id]:
            self._release(live)

    def step(self) -> list[TokenEvent]:
        """One forward pass. Returns an event for every request that got a token, ended or failed."""
        if self._live and not self._waiting and all(live.is_decoding for live in self._live):
            self.rest()  # a pause between two tokens, once for each size of pass
        events = self._admit()
        # alone, a prefill is not split: there is no stream to keep flowing, and one dense pass is the fastest
        budget = self.config.max_batch_tokens if len(self._live) > 1 else MAX_ROWS_ALONE
        shares = pack(self._live, budget)
        if not shares:
            return events
        groups = [_live(share).take(share.num_rows) for share in shares]
        begin = time.perf_counter()
        try:
            logits = self._forward(groups)
        except Exception as error:  # every request of this pass is lost, the engine is not
            log.exception("forward pass of %d requests failed", len(shares))
            self._num_failed += 1
            if self._num_failed >= MAX_FAILED_PASSES:
                raise  # not this request's fault: whoever runs the engine must know
            return events + [self._fail(_live(share), error) for share in shares]
        if self.model.device.type == "cpu":  # elsewhere the pass is still running, and the rate does not change
            self._clock.observe(groups, time.perf_counter() - begin)
        self._num_failed = row = 0
        for share, group in zip(shares, groups, strict=True):
            event = self._advance(share, logits[row] if group.num_logits else None)
            row += group.num_logits
            if event is not None:
                events.append(event)
        return events

    def _forward(self, groups: list[RowGroup]) -> torch.Tensor:
        logits = self._graphs.run(groups)
        if logits is None and len(groups) == 1:
            logits = self._passes.recompute(groups[0])
        return self.model.forward(groups, self.arena) if logits is None else logits

    def rest(self) -> None:
        """To be called when there is nothing to do: does what the next request would otherwise wait for."""
        self._passes.capture()

    def generate(self, request: EngineRequest) -> list[TokenEvent]:
        """Runs one request to its end, for commands and tests. Raises what made it fail."""
        self.submit(request)
        events: list[TokenEvent] = []
        while not events or events[-1].finish_reason is None:
            events += [e for e in self.step() if e.request_id == request.request_id]
        self.rest()
        if events[-1].error is not None:
            raise events[-1].error
        return events

    def prefill(self, request: EngineRequest) -> Prefilled:
        """Runs one request up to its first logits and keeps its span, to look at what the model knows there.

        For evaluation; the caller releases it. Nothing else may be running.
        """
        assert not self.has_work
        self.submit(request)
        self._waiting.clear()
        span = self.arena.allocate(request.plan.num_tokens + request.sampling.max_tokens)
        assert span is not None
        live = LiveRequest(request, span, self.model)
        try:
            self._begin(live)
            while True:
                group = live.take(live.num_pending if live.is_atomic else MAX_ROWS_ALONE)
                logits = self._forward([group])
                if group.num_logits:
                    logits = logits.clone()  # the next pass may use the same memory
                    break
                if live.is_filling and not live.num_pending:
                    self._select(live)
        except BaseException:
            self.arena.free(span)
            raise
        live.time("recompute_ms", live.prefill_begin, Mark.now(self.model.device))
        self.model.synchronize()
        live.settle()
        stats = replace(live.stats, ttft_ms=(time.perf_counter() - request.arrival) * 1e3)
        return Prefilled(self, span, request.plan.num_tokens, logits[0], stats)

    def _admit(self) -> list[TokenEvent]:
        """Gives spans to waiting requests in order of arrival, as long as there are slots."""
        failed = []
        while self._waiting and len(self._live) < self.config.max_num_requests:
            request = self._waiting[0]
            span = self.arena.allocate(request.plan.num_tokens + request.sampling.max_tokens)
            if span is None:
                break
            self._waiting.popleft()
            live = LiveRequest(request, span, self.model)
            waited_ms = (time.perf_counter() - request.arrival) * 1e3
            live.note(queue_ms=max(0.0, waited_ms - request.retrieve_ms), retrieve_ms=request.retrieve_ms)
            self._live.append(live)
            live.ran_alone = len(self._live) == 1
            try:
                self._begin(live)
            except Exception as error:  # this request is lost, the others are not
                failed.append(self._fail(live, error))
        return failed

    def _begin(self, live: LiveRequest) -> None:
        """Stitches stored KV in, unless everything is computed anyway (ratio 1 never looks at the store)."""
        plan, reuse = live.plan, live.request.reuse
        if reuse.effective_ratio >= 1 or not plan.prefix.token_ids:
            self._prefill(live)
            return
        live.went(AS_ASKED)
        names, _, prefix = self._prefix(plan.prefix.token_ids)
        candidates = plan_candidates(replace(names, owner=live.request.owner), plan, reuse)
        if self.config.route == "auto":
            is_first_exact = bool(candidates) and candidates[0][0].kind == "raw"
            sources = self._loader.locate(candidates)
            route = self._router.choose(plan, sources, reuse.effective_ratio * reuse.recompute_depth, is_first_exact)
            live.went(route)
            if route.way is Way.FULL:
                self._loader.read_ahead(candidates)  # so that the next one finds it nearer
                self._prefill(live)
                return
            if route.way is Way.PREFIX:
                self._loader.read_ahead(candidates[1:])
                candidates = candidates[:1]
        stitched = stitch_(self.model, self._loader, self.arena, live.span, plan, candidates, prefix, send=live.upload)
        live.note(load_ms=stitched.load_ms, reposition_ms=stitched.reposition_ms)
        live.stitched, live.arrival = stitched, stitched.arrival
        live.queue(stitched.missing, stitched.first_missing)
        live.prefill_begin = Mark.now(self.model.device)
        if not live.num_pending:
            self._select(live)

    def _prefill(self, live: LiveRequest) -> None:
        """Queues every token of the prompt."""
        live.queue(torch.arange(live.plan.num_tokens, device=self.model.device), first=0)
        live.stats = replace(live.stats, computed_tokens=live.plan.num_tokens)
        live.prefill_begin = Mark.now(self.model.device)

    def _select(self, live: LiveRequest) -> None:
        """All chunks are in the span: decides which tokens are run again, and queues them and the tail."""
        stitched, plan, reuse = live.stitched, live.plan, live.request.reuse
        assert stitched is not None
        seed = live.request.sampling.seed or 0
        inputs = ScoreInputs(
            self.model, self.arena, live.span, plan, stitched.candidates, reuse, seed, stitched.arrival, self._passes,
            live.tail,
        )  # fmt: skip
        selection = choose(inputs, stitched.num_reused)
        selected = selection.positions
        live.observer = recompute_observer(self.model, self.arena, plan, live.borders, selected, reuse)
        live.stitched = None
        num_layers = self.model.shape.num_layers
        num_recomputed = reuse.recomputed_layers(num_layers)
        num_leaving = len(selected) if num_recomputed < num_layers else 0
        live.queue(recompute_positions(plan, selected), num_leaving=num_leaving, leave_from=num_recomputed - 1)
        live.choose(stitched, selected)
        live.time("recompute_ms", live.prefill_begin, selection.begin)  # computing missing chunks in place
        live.time("probe_ms", selection.begin, selection.probed)
        live.time("select_ms", selection.probed, selection.selected)
        live.prefill_begin = selection.selected

    def _advance(self, share: Share, logits: torch.Tensor | None) -> TokenEvent | None:
        """What a request does after its rows have run."""
        live = _live(share)
        try:
            if logits is not None:
                return self._sample(live, logits)
            if live.is_filling and not live.num_pending:
                self._select(live)
        except Exception as error:
            return self._fail(live, error)
        return None

    def _sample(self, live: LiveRequest, logits: torch.Tensor) -> TokenEvent:
        """logits: (V,). Draws the next token and makes it the request's next row, or ends the request."""
        is_first, recomputed = live.num_generated == 0, Mark.now(self.model.device)
        token_id = live.sampler.next(logits)
        step = live.text.push(token_id)
        live.num_generated += 1
        live.stats = replace(live.stats, completion_tokens=live.num_generated)
        if is_first:
            ttft_ms = (time.perf_counter() - live.request.arrival) * 1e3
            live.time("recompute_ms", live.prefill_begin, recomputed)
            live.time("sample_ms", recomputed, Mark.now(self.model.device))
            self.model.synchronize()  # the device is done but for the last mark
            live.settle()
            live.stats = replace(live.stats, ttft_ms=ttft_ms, predicted_full_ms=self._predicted_full_ms(live))
            self._learn(live)
            live.observer, live.is_decoding = None, True
        finish: FinishReason | None = step.finished
        text = step.text
        if finish is None and live.num_generated >= live.request.sampling.max_tokens:
            finish, text = "length", text + live.text.flush()
        if finish is None:
            live.append(token_id)
        else:
            self._release(live)
        stats = live.stats if is_first or finish else None
        return TokenEvent(live.request.request_id, text, token_id, finish, stats)

    def _learn(self, live: LiveRequest) -> None:
        """From a request that nothing else slowed down."""
        if not live.ran_alone or len(self._live) > 1:
            return
        if live.stats.way == Way.REUSE.value:
            self._router.observe(live.plan, live.stats, live.request.reuse.recompute_depth)
        elif live.stats.way == Way.FULL.value and self.model.device.type != "cpu":  # there passes are timed one by one
            self._clock.observe_prefill(live.plan.num_tokens, live.stats.phases.recompute_ms)

    def _predicted_full_ms(self, live: LiveRequest) -> float | None:
        """Time to first token of full prefill: what this request waited, and a dense pass over its prompt."""
        prefill_ms, phases = self._clock.prefill_ms(live.plan.num_tokens), live.stats.phases
        return None if prefill_ms is None else phases.queue_ms + phases.retrieve_ms + prefill_ms + phases.sample_ms

    def _fail(self, live: LiveRequest, error: Exception) -> TokenEvent:
        if not isinstance(error, FusionRAGError):
            log.error("request %s failed", live.request.request_id, exc_info=error)
        self._release(live)
        return TokenEvent(live.request.request_id, "", None, "error", live.stats, error)

    def _release(self, live: LiveRequest) -> None:
        if live in self._live:
            self._live.remove(live)
            if live.arrival is not None:  # KV still on its way needs the span, and the memory that it comes from
                live.arrival.wait_for_all()
                self.model.synchronize()
            self.arena.free(live.span)


@dataclass(frozen=True)
class Prefilled:
    """A request that stands before its first token. logits: (V,) fp32 of that token."""

    engine: Engine
    span: Span
    num_tokens: int
    logits: torch.Tensor
    stats: RequestStats

    def extend(self, token_ids: Sequence[int], first: int = 0) -> torch.Tensor:
        """Runs `token_ids` as the answer's tokens from number `first` on. Returns (len(token_ids), V) logits.

        Earlier answer tokens must have been run; running a place again replaces what it held.
        """
        ids, positions = self.engine.model.rows(token_ids, self.num_tokens + first)
        return self.engine.model.forward([RowGroup(self.span, ids, positions, len(ids))], self.engine.arena)

    def release(self) -> None:
        self.engine.arena.free(self.span)


def _live(share: Share) -> LiveRequest:
    assert isinstance(share.request, LiveRequest)
    return share.request
