"""Which way a request goes to its first token: predicted from what was seen, and as it was asked for where in doubt."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusionrag.cost import PrefillClock
from fusionrag.prompt import PromptBuilder
from fusionrag.router import AS_ASKED, MARGIN, RETRY_AFTER, Router, Way
from fusionrag.sampling import SamplingParams
from fusionrag.store import MemoryStore
from fusionrag.store.base import StoredHit
from fusionrag.types import ChunkReceipt, KVSource, Phases, RequestStats
from tests.conftest import PROMPT, Bench

HOST, DISK, COMPUTED = KVSource.HOST, KVSource.DISK, KVSource.COMPUTED
PREFILL_MS_PER_TOKEN = 1.0  # as long as attention is small beside the matrix products


@pytest.fixture(scope="session")
def make_bench_of(make_model):
    """A bench for tests that draw examples, which take no fixtures of a single function."""
    model = make_model()
    return lambda: Bench(model, PromptBuilder(model.tokenizer, PROMPT), MemoryStore())


@pytest.fixture
def plan(bench):
    return bench.plan(bench.chunks(600, 500, 400))


@pytest.fixture
def clock(bench, plan):
    clock = PrefillClock(bench.model)
    clock.observe_prefill(200, 200 * PREFILL_MS_PER_TOKEN)
    return clock


@pytest.fixture
def router(bench, clock):
    return Router(bench.model, clock)


def seen(plan, *sources, load_ms=0.0, probe_ms=0.0, recompute_ms=1.0, recompute_ratio=0.2) -> RequestStats:
    """The receipt of a request whose chunks came from `sources`."""
    receipts = tuple(
        ChunkReceipt(s.chunk.chunk_id, s.num_tokens, source, "raw")
        for s, source in zip(plan.chunks, sources, strict=True)
    )
    reused = sum(r.num_tokens for r in receipts if r.source is not COMPUTED)
    return RequestStats(
        prompt_tokens=plan.num_tokens,
        recomputed_tokens=round(recompute_ratio * reused),
        computed_tokens=plan.num_tokens - plan.prefix.num_tokens - reused,
        way="reuse",
        phases=Phases(load_ms=load_ms, probe_ms=probe_ms, recompute_ms=recompute_ms),
        chunks=receipts,
    )


def test_rates_that_were_never_seen_predict_nothing(bench, clock, plan):
    assert Router(bench.model, PrefillClock(bench.model)).choose(plan, [HOST] * 3, 0.2) == AS_ASKED
    router = Router(bench.model, clock)
    assert router.choose(plan, [HOST] * 3, 0.2) == AS_ASKED, "reuse was never seen"
    router.observe(plan, seen(plan, HOST, HOST, HOST, load_ms=1e6))
    assert router.choose(plan, [HOST, DISK, HOST], 0.2) == AS_ASKED, "no KV was ever read from disk"
    assert router.choose(plan, [HOST] * 3, 0.2) != AS_ASKED
    blind = Router(bench.model, PrefillClock(bench.model))
    blind.observe(plan, seen(plan, HOST, HOST, HOST, load_ms=1e6))
    assert blind.choose(plan, [HOST] * 3, 0.2) == AS_ASKED, "how fast a full prefill is, nobody knows"


def test_full_prefill_is_chosen_where_kv_comes_from_a_tier_that_is_too_slow(router, plan):
    router.observe(plan, seen(plan, HOST, HOST, HOST, load_ms=1))
    router.observe(plan, seen(plan, DISK, DISK, DISK, load_ms=10 * plan.num_tokens * PREFILL_MS_PER_TOKEN))
    assert router.choose(plan, [HOST] * 3, 0.2).way is Way.REUSE
    assert router.choose(plan, [DISK] * 3, 0.2).way is Way.FULL
    assert router.choose(plan, [HOST, DISK, HOST], 0.0).way in (Way.FULL, Way.PREFIX)


def test_the_exact_prefix_is_chosen_where_only_the_other_chunks_are_slow(router, plan):
    router.observe(plan, seen(plan, HOST, HOST, HOST, load_ms=0.1))
    router.observe(plan, seen(plan, DISK, DISK, DISK, load_ms=10 * plan.num_tokens * PREFILL_MS_PER_TOKEN))
    route = router.choose(plan, [HOST, DISK, DISK], 0.2)
    assert route.way is Way.PREFIX
    assert route.predicted_ms[Way.PREFIX] < route.predicted_ms[Way.FULL] < route.predicted_ms[Way.REUSE]
    inexact = router.choose(plan, [HOST, DISK, DISK], 0.2, is_first_exact=False)
    assert inexact.way is Way.FULL and Way.PREFIX not in inexact.predicted_ms
    assert router.choose(plan, [None, DISK, DISK], 0.2).way is Way.FULL


@given(faster_by=st.floats(-0.5, 0.5))
def test_another_way_must_be_faster_by_the_margin(faster_by, make_bench_of):
    bench = make_bench_of()
    plan, clock = bench.plan(bench.chunks(600, 500, 400)), PrefillClock(bench.model)
    clock.observe_prefill(200, 200)
    router = Router(bench.model, clock)
    full_ms = clock.prefill_ms(plan.num_tokens)
    # recomputing takes next to nothing, bringing takes the time of full prefill and a share of it more or less
    router.observe(plan, seen(plan, HOST, HOST, HOST, load_ms=full_ms / (1 - faster_by), recompute_ms=1e-6))
    route = router.choose(plan, [HOST] * 3, 0.2, is_first_exact=False)
    if abs(faster_by - MARGIN) > 0.01:
        assert route.way is (Way.FULL if faster_by > MARGIN else Way.REUSE)
    assert set(route.predicted_ms) == {Way.FULL, Way.REUSE}


@given(ratios=st.lists(st.floats(0, 1), min_size=2, max_size=8), missing=st.booleans())
def test_a_higher_ratio_is_never_predicted_to_be_faster(ratios, missing, make_bench_of):
    bench = make_bench_of()
    plan, clock = bench.plan(bench.chunks(600, 500, 400)), PrefillClock(bench.model)
    clock.observe_prefill(200, 200)
    router = Router(bench.model, clock)
    router.observe(plan, seen(plan, HOST, HOST, HOST, load_ms=3, probe_ms=2, recompute_ms=40))
    sources = [HOST, None if missing else HOST, HOST]
    predicted = [router.choose(plan, sources, ratio).predicted_ms[Way.REUSE] for ratio in sorted(ratios)]
    assert predicted == sorted(predicted)


def test_a_request_like_the_one_that_was_seen_is_predicted_to_take_as_long(router, plan):
    router.observe(plan, seen(plan, HOST, HOST, HOST, load_ms=3, probe_ms=2, recompute_ms=40, recompute_ratio=0.2))
    predicted = router.choose(plan, [HOST] * 3, 0.2).predicted_ms[Way.REUSE]
    assert predicted == pytest.approx(3 + 2 + 40, rel=1e-3)


def test_one_request_that_was_slowed_down_changes_no_rate_that_is_known(router, plan):
    for _ in range(3):
        router.observe(plan, seen(plan, HOST, HOST, HOST, load_ms=3, probe_ms=2, recompute_ms=40))
    before = router.choose(plan, [HOST] * 3, 0.2)
    router.observe(plan, seen(plan, HOST, HOST, HOST, load_ms=3e4, probe_ms=2e4, recompute_ms=4e5))
    assert router.choose(plan, [HOST] * 3, 0.2).predicted_ms == pytest.approx(before.predicted_ms)
    for _ in range(4):  # it has become slow
        router.observe(plan, seen(plan, HOST, HOST, HOST, load_ms=3e4, probe_ms=2e4, recompute_ms=4e5))
    assert router.choose(plan, [HOST] * 3, 0.2).way is Way.FULL


def test_passes_of_few_rows_tell_nothing_of_the_speed_of_long_ones(router, plan):
    router.observe(plan, seen(plan, HOST, HOST, HOST, load_ms=3, recompute_ms=40, recompute_ratio=0.0))
    assert router.choose(plan, [HOST] * 3, 0.2) == AS_ASKED, "only the tail was run"
    router.observe(plan, seen(plan, HOST, HOST, HOST, load_ms=3, recompute_ms=90, recompute_ratio=0.2))
    predicted = [router.choose(plan, [HOST] * 3, ratio).predicted_ms[Way.REUSE] for ratio in (0.0, 0.2)]
    assert predicted == pytest.approx([43, 93], rel=1e-3)


def test_what_the_probe_takes_hardly_depends_on_the_length_of_the_prompt(bench, clock):
    short, long = (bench.plan(bench.chunks(600, 500, 400 * n)) for n in (1, 6))
    router = Router(bench.model, clock)
    router.observe(short, seen(short, HOST, HOST, HOST, load_ms=1e-9, probe_ms=100, recompute_ms=1e-9))
    predicted = router.choose(long, [HOST] * 3, 0.2).predicted_ms[Way.REUSE]
    assert 100 < predicted < 100 * long.num_tokens / short.num_tokens


def test_only_requests_of_one_tier_teach_how_fast_it_is(router, plan):
    router.observe(plan, seen(plan, HOST, HOST, HOST, load_ms=1))
    before = router.choose(plan, [HOST] * 3, 0.2)
    router.observe(plan, seen(plan, HOST, DISK, HOST, load_ms=1e6))
    assert router.choose(plan, [HOST] * 3, 0.2).predicted_ms == pytest.approx(before.predicted_ms)
    assert router.choose(plan, [DISK] * 3, 0.2) == AS_ASKED, "of the disk nothing is known yet"
    router.observe(plan, seen(plan, DISK, DISK, COMPUTED, load_ms=1e6))  # what was computed was not brought
    assert router.choose(plan, [DISK] * 3, 0.2).way is Way.FULL


# --- the engine goes the way that was chosen --------------------------------------------------------------------------


class DistantStore(MemoryStore):
    """Objects lie on a disk that takes its time, but for those that are `near`."""

    def __init__(self, delay_s: float) -> None:
        super().__init__()
        self.delay_s, self.near, self.num_read = delay_s, set(), 0

    def recall(self, spec):
        return super().recall(spec) if spec.digest in self.near else None

    def get(self, spec):
        hit = super().recall(spec)
        if hit is None:
            return None
        self.num_read += 1
        time.sleep(self.delay_s)
        return StoredHit(hit.payload, DISK)


@pytest.fixture
def distant(make_bench):
    return make_bench(store=DistantStore(delay_s=0.5))


def test_a_request_whose_kv_is_far_away_is_prefilled_in_full_and_its_receipt_says_so(distant):
    chunks = distant.chunks(300, 200, 250)
    distant.preprocess(chunks)
    plan, engine = distant.plan(chunks), distant.engine(route="auto")
    engine.calibrate()
    sampling = SamplingParams(max_tokens=6, ignore_eos=True)

    def ask(**reuse):
        events = engine.generate(distant.request(plan, sampling=sampling, **reuse))
        return distant.tokens(events), events[-1].stats

    _, first = ask(recompute_ratio=0.2)
    assert (first.way, first.predicted_ms) == ("reuse", None), "nothing was known yet"
    assert {c.source for c in first.chunks} == {DISK}
    tokens, second = ask(recompute_ratio=0.2)
    assert second.way == "full" and second.chunks == ()
    assert (second.reused_tokens, second.computed_tokens) == (0, plan.num_tokens)
    assert 0 < second.predicted_ms < first.ttft_ms and 0 < second.predicted_full_ms < first.ttft_ms
    assert second.ttft_ms < 500, "it did not wait for the disk"
    assert tokens == ask(method="full")[0]
    assert distant.store.num_read > len(chunks), "what was not waited for is read for those who come later"
    assert engine.arena.num_free == engine.arena.num_slots


def test_a_request_that_is_sent_to_full_prefill_has_its_logits(distant):
    chunks = distant.chunks(300, 200, 250)
    distant.preprocess(chunks)
    plan, engine = distant.plan(chunks), distant.engine(route="auto")
    engine.calibrate()
    engine._router.observe(plan, seen(plan, DISK, DISK, DISK, load_ms=1e6))
    prefilled = distant.prefill(plan, engine, recompute_ratio=0.2)
    assert prefilled.stats.way == "full"
    assert prefilled.logits.equal(distant.full(plan))


def test_a_request_that_takes_its_exact_prefix_alone_has_the_logits_of_full_prefill(distant):
    first, *others = distant.chunks(500, 150, 150)
    distant.preprocess([first, *others])
    distant.store.near = {distant.spec(first).digest}
    plan, engine = distant.plan([first, *others]), distant.engine(route="auto")
    engine.calibrate()
    engine._router.observe(plan, seen(plan, HOST, HOST, HOST, load_ms=1e-3))
    engine._router.observe(plan, seen(plan, DISK, DISK, DISK, load_ms=1e6))
    prefilled = distant.prefill(plan, engine, recompute_ratio=0.2)
    assert prefilled.stats.way == "prefix"
    assert [c.source for c in prefilled.stats.chunks] == [HOST, COMPUTED, COMPUTED]
    assert prefilled.stats.reused_tokens == plan.prefix.num_tokens + 500
    torch.testing.assert_close(prefilled.logits, distant.full(plan), rtol=0, atol=1e-4)


def test_a_first_chunk_that_is_not_exact_is_no_prefix_to_stop_at(distant):
    chunks = distant.with_neighbours(distant.chunks(500, 150, 150), num_related=1)
    distant.preprocess(chunks)
    distant.store.near = {distant.spec(chunks[0], "fused").digest}
    plan, engine = distant.plan(chunks), distant.engine(route="auto")
    engine.calibrate()
    engine._router.observe(plan, seen(plan, HOST, HOST, HOST, load_ms=1e-3))
    engine._router.observe(plan, seen(plan, DISK, DISK, DISK, load_ms=1e6))
    assert distant.prefill(plan, engine, recompute_ratio=0.2, first_chunk_raw=False).stats.way == "full"


def test_a_request_goes_as_asked_where_the_operator_wants_that(distant):
    chunks = distant.chunks(400, 300)
    distant.preprocess(chunks)
    plan, engine = distant.plan(chunks), distant.engine(route="reuse")
    engine.calibrate()
    engine._router.observe(plan, seen(plan, DISK, DISK, load_ms=1e6))
    stats = distant.prefill(plan, engine, recompute_ratio=0.2).stats
    assert (stats.way, stats.predicted_ms) == ("reuse", None)


@pytest.mark.parametrize("reuse", [{"method": "full"}, {"recompute_ratio": 1.0}])
def test_full_prefill_that_was_asked_for_is_called_so(reuse, bench):
    stats = bench.prefill(bench.plan(bench.chunks(9)), bench.engine(route="auto"), **reuse).stats
    assert (stats.way, stats.predicted_ms) == ("full", None)


def test_a_way_that_was_left_is_tried_again_now_and_then(router, plan):
    """Else a rate seen in a bad hour would send everything another way for ever."""
    for _ in range(5):
        router.observe(plan, seen(plan, HOST, DISK, DISK, load_ms=1e6))
        router.observe(plan, seen(plan, DISK, DISK, DISK, load_ms=1e6))
    ways = [router.choose(plan, [DISK] * 3, 0.2).way for _ in range(2 * RETRY_AFTER + 2)]
    assert ways.count(Way.REUSE) == 2 and ways[RETRY_AFTER] is ways[-1] is Way.REUSE
