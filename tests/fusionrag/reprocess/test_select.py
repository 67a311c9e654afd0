"""Which tokens are recomputed: exactly the budget, only candidates, the best first; and what the receipts then say."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from fusionrag.config import METHODS
from fusionrag.reprocess.select import SCORERS, budget, select
from fusionrag.sampling import SamplingParams

EXACT_BUDGET = sorted(SCORERS.keys() - {"cacheblend_gradual"})  # that one drops rows on the way: see test_blend
LENGTHS = (23, 40, 17, 31)


@pytest.fixture
def plan(bench):
    chunks = bench.with_neighbours(bench.chunks(*LENGTHS), num_related=1)
    bench.preprocess(chunks)
    return bench.plan(chunks)


def recomputed_positions(bench, plan, seed=None, **reuse):
    """Where the span differs from one in which nothing was recomputed; layer 2 depends on all a token saw."""
    engine, held = bench.engine(), []
    for changes in ({"correction": 0.0, **reuse}, {"method": "reuse"}):
        sampling = SamplingParams(max_tokens=8, seed=seed)
        prefilled = engine.prefill(bench.request(plan, sampling=sampling, **changes))
        held.append(engine.arena.view(2, prefilled.span)[1][:, : plan.tail.start].clone())
        prefilled.release()
    return (held[0] - held[1]).abs().amax((0, 2)).nonzero()[:, 0].tolist()


# --- counts -----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 100), st.integers(0, 3000), st.integers(0, 3000))
@example(7, 100, 3000)  # 0.07 * 100 is more than 7 in floating point
def test_the_budget_is_the_ceiling_of_the_exact_product(percent, num_reused, num_candidates):
    exact = math.ceil(Fraction(percent, 100) * num_reused)
    assert budget(percent / 100, num_reused, num_candidates) == min(exact, num_candidates)


@pytest.mark.parametrize("recompute_ratio", [0.0, 0.01, 0.15, 0.5, 0.78, 0.9])
@pytest.mark.parametrize("method", EXACT_BUDGET)
def test_counts_are_exact_and_add_up(method, recompute_ratio, bench, plan):
    stats = bench.prefill(plan, method=method, recompute_ratio=recompute_ratio).stats
    expected = min(math.ceil(recompute_ratio * sum(LENGTHS)), sum(LENGTHS[1:]))
    assert stats.recomputed_tokens == expected == sum(r.num_recomputed for r in stats.chunks)
    assert stats.reused_tokens == plan.prefix.num_tokens + sum(LENGTHS) - expected
    assert stats.computed_tokens == plan.tail.num_tokens
    assert stats.reused_tokens + stats.recomputed_tokens + stats.computed_tokens == stats.prompt_tokens
    assert [(r.chunk_id, r.num_tokens) for r in stats.chunks] == [(s.chunk.chunk_id, s.num_tokens) for s in plan.chunks]


@pytest.mark.parametrize("method", EXACT_BUDGET)
def test_missing_chunks_count_as_computed_and_not_into_the_budget(method, bench, plan):
    for kind in ("raw", "fused"):
        bench.store.delete(bench.spec(plan.chunks[1].chunk, kind).digest)
    stats = bench.prefill(plan, method=method, recompute_ratio=0.25).stats
    num_reused = sum(LENGTHS) - LENGTHS[1]
    assert stats.recomputed_tokens == math.ceil(0.25 * num_reused)
    assert stats.computed_tokens == plan.tail.num_tokens + LENGTHS[1]
    assert stats.reused_tokens + stats.recomputed_tokens + stats.computed_tokens == stats.prompt_tokens
    assert [r.num_recomputed for r in stats.chunks][:2] == [0, 0]


def test_full_prefill_computes_everything(bench, plan):
    stats = bench.prefill(plan, method="full").stats
    assert (stats.reused_tokens, stats.recomputed_tokens, stats.computed_tokens) == (0, 0, plan.num_tokens)


# --- places -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute_ratio", [0.1, 0.75, 0.999999])
@pytest.mark.parametrize("method", EXACT_BUDGET)
def test_prefix_tail_and_an_exact_first_chunk_are_never_selected(method, recompute_ratio, bench, plan):
    positions = recomputed_positions(bench, plan, method=method, recompute_ratio=recompute_ratio)
    num_candidates = sum(LENGTHS[1:])
    assert len(positions) == min(math.ceil(recompute_ratio * sum(LENGTHS)), num_candidates)
    assert plan.chunks[1].start <= min(positions) and max(positions) < plan.tail.start


@pytest.mark.parametrize("num_each", [1, 4, 15])
def test_epic_selects_the_first_tokens_of_every_chunk(num_each, bench, plan):
    ratio = 3 * num_each / sum(LENGTHS)
    positions = recomputed_positions(bench, plan, method="epic", recompute_ratio=ratio)
    assert positions == [s.start + i for s in plan.chunks[1:] for i in range(num_each)]


def test_random_selects_by_the_requests_seed(bench, plan):
    one, again, other = (
        recomputed_positions(bench, plan, seed=seed, method="random", recompute_ratio=0.3) for seed in (1, 1, 2)
    )
    assert one == again != other


def test_scorers_select_differently(bench, plan):
    selected = {m: tuple(recomputed_positions(bench, plan, method=m, recompute_ratio=0.3)) for m in SCORERS}
    assert len(set(selected.values())) == len(SCORERS)


@given(st.data())
def test_selected_are_the_best_candidates_in_ascending_order(data):
    num_tokens = data.draw(st.integers(1, 40))
    importance = torch.tensor(data.draw(st.lists(st.integers(0, 5), min_size=num_tokens, max_size=num_tokens))).float()
    candidates = sorted(data.draw(st.sets(st.integers(0, num_tokens - 1))))
    num_selected = data.draw(st.integers(0, len(candidates)))
    selected = select(importance, torch.tensor(candidates, dtype=torch.int64), num_selected).tolist()
    expected = sorted(sorted(candidates, key=lambda p: (-importance[p], p))[:num_selected])  # ties by position
    assert selected == expected


def test_nothing_is_scored_where_all_or_none_are_taken(bench, plan):
    for recompute_ratio in (0.0, 0.999999):
        phases = bench.prefill(plan, method="attention", recompute_ratio=recompute_ratio).stats.phases
        assert phases.probe_ms == phases.select_ms == 0
    phases = bench.prefill(plan, method="attention", recompute_ratio=0.5).stats.phases
    assert phases.probe_ms > 0


def test_every_method_but_the_baselines_has_a_scorer():
    assert set(SCORERS) == set(METHODS) - {"full", "reuse"}


# --- what it is for ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_related", [0, 2])
@pytest.mark.parametrize("method", EXACT_BUDGET)
def test_recomputing_most_tokens_is_nearer_to_full_prefill_than_recomputing_none(method, num_related, bench):
    """On average over prompts; a single prompt may go astray."""
    divergence = {0.0: 0.0, 0.9: 0.0}
    for seed in range(6):
        chunks = bench.with_neighbours(bench.chunks(*LENGTHS, seed=seed), num_related)
        bench.preprocess(chunks)
        plan = bench.plan(chunks, f"question {seed}")
        full = bench.full(plan).log_softmax(-1)
        for ratio in divergence:
            logits = bench.prefill(plan, method=method, recompute_ratio=ratio).logits.log_softmax(-1)
            divergence[ratio] += float((full.exp() * (full - logits)).sum())
    assert divergence[0.9] < divergence[0.0]
