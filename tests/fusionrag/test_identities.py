"""Every shortcut has a setting at which it must equal the full computation. Here it does, through the engine."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fusionrag.config import METHODS
from fusionrag.layout import compute_prefix
from fusionrag.preprocess.passes import ChunkJob, compute_chunks
from fusionrag.sampling import SamplingParams
from fusionrag.types import KVSource

SELECTORS = ["attention", "fusionrag", "cacheblend", "epic", "random"]
ALL_BUT_EXACT = 0.999999  # every candidate is recomputed; 1 would not look at the store at all


def close(logits, expected, atol=1e-4):
    torch.testing.assert_close(logits, expected, rtol=0, atol=atol)


@pytest.fixture
def corpus(bench):
    """Four chunks, each behind the next two, with honest KV in the store."""
    chunks = bench.with_neighbours(bench.chunks(23, 40, 17, 31), num_related=2)
    bench.preprocess(chunks)
    return chunks


# --- everything recomputed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_ratio_1_equals_full_prefill_whatever_the_store_holds(method, bench):
    chunks = bench.with_neighbours(bench.chunks(23, 40, 17), num_related=1)
    plan = bench.plan(chunks)
    expected = bench.full(plan)
    for i, chunk in enumerate(chunks):
        for kind in ("raw", "fused"):
            bench.store.put(bench.spec(chunk, kind), bench.garbage(chunk, seed=i))
    reused = bench.prefill(plan, method="reuse").logits
    assert (reused - expected).abs().max() > 0.5  # the garbage is found, and does harm
    if method != "reuse":
        close(bench.prefill(plan, method=method, recompute_ratio=1.0).logits, expected, atol=0)


def test_full_prefill_equals_stock_transformers(bench, make_hf, make_config, corpus):
    plan = bench.plan(corpus)
    with torch.no_grad():
        expected = make_hf(make_config("llama"), "eager")(torch.tensor([plan.token_ids])).logits[0, -1]
    close(bench.full(plan), expected)


@pytest.mark.parametrize("recompute_ratio", [1.0, ALL_BUT_EXACT])
def test_greedy_answers_equal_those_of_stock_transformers(recompute_ratio, family, make_bench, make_hf, make_config):
    bench, hf = make_bench(family), make_hf(make_config(family), "eager")
    chunks = bench.chunks(23, 40)
    bench.preprocess(chunks)
    plan = bench.plan(chunks)
    request = bench.request(
        plan, sampling=SamplingParams(max_tokens=6, ignore_eos=True), recompute_ratio=recompute_ratio
    )
    expected = list(plan.token_ids)
    with torch.no_grad():
        for _ in range(6):
            expected.append(int(hf(torch.tensor([expected])).logits[0, -1].argmax()))
    assert bench.tokens(bench.engine().generate(request)) == expected[-6:]


@pytest.mark.parametrize("num_related", [0, 2])
@pytest.mark.parametrize("method", SELECTORS)
def test_all_candidates_recomputed_equals_full_prefill(method, num_related, bench):
    chunks = bench.with_neighbours(bench.chunks(23, 40, 17, 31), num_related)
    bench.preprocess(chunks)
    plan = bench.plan(chunks)
    expected = bench.full(plan)
    assert (bench.prefill(plan, method="reuse").logits - expected).abs().max() > 0.05
    prefilled = bench.prefill(plan, method=method, recompute_ratio=ALL_BUT_EXACT)
    close(prefilled.logits, expected)
    assert [r.num_recomputed for r in prefilled.stats.chunks] == [0, 40, 17, 31]  # the first chunk is exact


def test_all_candidates_recomputed_equals_full_prefill_in_every_family(family, make_bench):
    bench = make_bench(family)
    chunks = bench.with_neighbours(bench.chunks(23, 40, 31), num_related=1)
    bench.preprocess(chunks)
    plan = bench.plan(chunks)
    expected = bench.full(plan)
    assert (bench.prefill(plan, method="reuse").logits - expected).abs().max() > 0.05
    for method in ("attention", "fusionrag", "cacheblend"):
        close(bench.prefill(plan, method=method, recompute_ratio=ALL_BUT_EXACT).logits, expected)


@pytest.mark.parametrize("order", [(3, 1, 0, 2), (2, 3, 1, 0)])
def test_the_order_of_the_passages_is_the_requests_own(order, bench, corpus):
    plan = bench.plan([corpus[i] for i in order])
    close(bench.prefill(plan, recompute_ratio=ALL_BUT_EXACT).logits, bench.full(plan))


def test_a_first_chunk_taken_fused_is_recomputed_too(bench, corpus):
    plan = bench.plan(corpus)
    prefilled = bench.prefill(plan, recompute_ratio=ALL_BUT_EXACT, first_chunk_raw=False)
    assert [(r.kind, r.num_recomputed) for r in prefilled.stats.chunks[:1]] == [("fused", 23)]
    close(prefilled.logits, bench.full(plan))


def test_a_prompt_without_passages_is_computed(bench):
    plan = bench.plan([])
    prefilled = bench.prefill(plan)
    close(prefilled.logits, bench.full(plan))
    assert prefilled.stats.reused_tokens == plan.prefix.num_tokens


# --- nothing recomputed, in the context it was computed in ------------------------------------------------------------


def test_a_chunk_behind_the_prefix_is_exact_in_every_family(family, make_bench):
    bench = make_bench(family)
    chunks = bench.chunks(40)
    bench.preprocess(chunks)
    plan = bench.plan(chunks)
    prefilled = bench.prefill(plan, method="reuse")
    close(prefilled.logits, bench.full(plan))
    assert prefilled.stats.reused_tokens == plan.prefix.num_tokens + 40


def test_a_chunk_behind_the_chunk_it_was_fused_behind_is_exact_in_every_family(family, make_bench):
    bench = make_bench(family)
    a, b = bench.chunks(40, 25)
    b = bench.behind(b, [a])
    bench.preprocess([a, b])
    plan = bench.plan([a, b])
    prefilled = bench.prefill(plan, method="reuse")
    close(prefilled.logits, bench.full(plan))
    assert [r.kind for r in prefilled.stats.chunks] == ["raw", "fused"]
    raw = bench.prefill(bench.plan([a, bench.behind(b, ())]), method="reuse").logits
    assert (raw - bench.full(plan)).abs().max() > 0.01  # so it is the fused KV that is exact


def test_a_chunk_computed_behind_exact_context_is_exact(bench):
    """c behind (a, b): b's own KV must be the one computed behind a, for that is what full prefill sees there."""
    a, b, c = bench.chunks(23, 31, 17)
    b, c = bench.behind(b, [a]), bench.behind(c, [a, b])
    bench.preprocess([a, b])
    context = tuple(bench.store.get(spec).kv for spec in (bench.spec(a), bench.spec(b, "fused")))
    prefix, arena = compute_prefix(bench.model, bench.prompts.prefix_ids), bench.model.new_arena(200)
    (kv,) = compute_chunks(bench.model, arena, prefix, [ChunkJob(c.token_ids, context)])
    bench.store.put(bench.spec(c, "fused"), kv)
    plan = bench.plan([a, b, c])
    close(bench.prefill(plan, method="reuse").logits, bench.full(plan))


def test_layer_0_of_a_moved_chunk_equals_layer_0_computed_there(family, make_bench):
    """Its keys and values depend on the token and its position alone, so they test the move by itself."""
    bench = make_bench(family)
    chunks = bench.chunks(23, 40, 31)
    bench.preprocess(chunks)
    plan, engine = bench.plan(chunks[::-1]), bench.engine()
    held = []
    for method in ("reuse", "full"):
        prefilled = engine.prefill(bench.request(plan, method=method))
        keys, values = engine.arena.view(0, prefilled.span)
        held.append((keys[:, : plan.num_tokens].clone(), values[:, : plan.num_tokens].clone()))
        prefilled.release()
    close(held[0], held[1], atol=1e-5)


# --- nothing in the store ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute_ratio", [0.0, 0.15, ALL_BUT_EXACT])
@pytest.mark.parametrize("method", SELECTORS)
def test_an_empty_store_gives_full_prefill(method, recompute_ratio, bench):
    plan = bench.plan(bench.with_neighbours(bench.chunks(23, 40, 17), 1))
    prefilled = bench.prefill(plan, method=method, recompute_ratio=recompute_ratio)
    close(prefilled.logits, bench.full(plan))
    assert {(r.source, r.num_recomputed) for r in prefilled.stats.chunks} == {(KVSource.COMPUTED, 0)}
    assert prefilled.stats.computed_tokens == plan.num_tokens - plan.prefix.num_tokens


def test_missing_chunks_behind_exact_ones_are_computed_exactly(bench):
    a, b, c = bench.chunks(23, 40, 17)
    bench.preprocess([a])
    plan = bench.plan([a, b, c])
    prefilled = bench.prefill(plan)
    close(prefilled.logits, bench.full(plan))
    assert [r.source for r in prefilled.stats.chunks] == [KVSource.HOST, KVSource.COMPUTED, KVSource.COMPUTED]


def test_stored_chunks_behind_a_missing_one_are_selected_from(bench):
    a, b, c = bench.chunks(23, 40, 17)
    bench.preprocess([b, c])
    plan = bench.plan([a, b, c])
    prefilled = bench.prefill(plan, recompute_ratio=ALL_BUT_EXACT)
    close(prefilled.logits, bench.full(plan))
    assert [(r.source, r.num_recomputed) for r in prefilled.stats.chunks] == [
        (KVSource.COMPUTED, 0),
        (KVSource.HOST, 40),
        (KVSource.HOST, 17),
    ]


def test_a_missing_chunk_behind_a_reused_one_sees_what_really_stands_there(bench):
    """Computed behind b's stored KV, as the tail will see b, not behind a b computed afresh."""
    a, b, c = bench.chunks(23, 40, 17)
    bench.preprocess([a, b])
    plan = bench.plan([a, b, c])
    missing = bench.prefill(plan, method="reuse").logits
    context = tuple(bench.store.get(bench.spec(chunk)).kv for chunk in (a, b))
    prefix, arena = compute_prefix(bench.model, bench.prompts.prefix_ids), bench.model.new_arena(200)
    (kv,) = compute_chunks(bench.model, arena, prefix, [ChunkJob(c.token_ids, context)])
    c = bench.behind(c, [a, b])
    bench.store.put(bench.spec(c, "fused"), kv)
    close(missing, bench.prefill(bench.plan([a, b, c]), method="reuse").logits)


def test_a_missing_fused_object_falls_back_to_raw(bench, corpus):
    plan = bench.plan(corpus)
    fused = bench.prefill(plan, method="reuse")
    for chunk in corpus:
        bench.store.delete(bench.spec(chunk, "fused").digest)
    fallen_back = bench.prefill(plan, method="reuse")
    assert [r.kind for r in fused.stats.chunks] == ["raw", "fused", "fused", "fused"]
    assert {(r.kind, r.source) for r in fallen_back.stats.chunks} == {("raw", KVSource.HOST)}
    raw_plan = bench.plan([bench.behind(c, ()) for c in corpus])
    assert torch.equal(fallen_back.logits, bench.prefill(raw_plan, method="reuse").logits)


@pytest.mark.parametrize("related", [None, ()])
def test_a_chunk_with_no_related_chunks_is_reused_raw(related, bench, corpus):
    plan = bench.plan([bench.behind(c, related) for c in corpus])
    assert {r.kind for r in bench.prefill(plan, method="reuse").stats.chunks} == {"raw"}


# --- again ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", SELECTORS)
def test_the_same_request_gives_the_same_logits_again(method, bench, corpus):
    """In the same engine, at the same slots, which hold what the first left there."""
    plan, engine = bench.plan(corpus), bench.engine()
    first, second = (bench.prefill(plan, engine, method=method, recompute_ratio=0.3) for _ in range(2))
    assert torch.equal(first.logits, second.logits)
    assert first.stats.chunks == second.stats.chunks


def test_what_the_arena_held_before_does_not_matter(bench, corpus):
    plan, clean, dirty = bench.plan(corpus), bench.engine(), bench.engine()
    generator = torch.Generator().manual_seed(3)
    for held in (dirty.arena.keys, dirty.arena.values):
        held.copy_(torch.randn(held.shape, generator=generator) * 10)
    for method in SELECTORS:
        logits = [bench.prefill(plan, e, method=method, recompute_ratio=0.3).logits for e in (clean, dirty)]
        assert torch.equal(*logits)


# --- one fused KV behind each related chunk ---------------------------------------------------------------------------


def each(bench, chunk, related):
    return replace(bench.behind(chunk, related), fused_behind="each")


@pytest.mark.parametrize("ratio", [0.0, 0.3])
def test_a_chunk_behind_the_one_it_was_fused_behind_is_exact(ratio, family, make_bench):
    bench = make_bench(family)
    a, b, other = bench.chunks(23, 40, 17)
    b = each(bench, b, [other, a])
    bench.preprocess([a, b, other])
    plan = bench.plan([a, b])
    prefilled = bench.prefill(plan, recompute_ratio=ratio)
    assert [r.kind for r in prefilled.stats.chunks] == ["raw", "fused"]
    close(prefilled.logits, bench.full(plan))


def test_a_prompt_without_a_chunks_related_ones_takes_it_raw(bench, corpus):
    a, b, c, d = corpus
    chunks = [each(bench, a, [d]), each(bench, b, [d]), each(bench, c, [d])]
    bench.preprocess([*chunks, d])
    plan = bench.plan(chunks)
    assert {r.kind for r in bench.prefill(plan, method="reuse").stats.chunks} == {"raw"}


@pytest.mark.parametrize("method", ["attention", "fusionrag"])
def test_all_recomputed_behind_each_equals_full_prefill(method, bench, corpus):
    a, b, c, d = corpus
    chunks = [each(bench, a, [b]), each(bench, b, [a, d]), each(bench, c, [d]), each(bench, d, [b])]
    bench.preprocess(chunks)
    plan = bench.plan(chunks)
    for ratio, kind in ((0.0, "raw"), (0.1, "fused")):  # c's related chunks: d follows it, and so it has only that
        kinds = [r.kind for r in bench.prefill(plan, recompute_ratio=ratio).stats.chunks]
        assert kinds == ["raw", "fused", kind, "fused"]
    close(bench.prefill(plan, method=method, recompute_ratio=ALL_BUT_EXACT).logits, bench.full(plan))
