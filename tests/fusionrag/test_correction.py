"""The mean residual: added to the tokens left alone, in the request's span only, all recomputed rows in one pass."""

from __future__ import annotations

import pytest
import torch

from fusionrag.types import ChunkKV


@pytest.fixture
def corpus(bench):
    chunks = bench.chunks(23, 40, 17, 31)
    bench.preprocess(chunks)
    return chunks


def held(bench, plan, **reuse):
    """Un-rotated keys and values (L, G, N, D) that the prompt's span holds before the first token."""
    engine = bench.engine()
    prefilled = engine.prefill(bench.request(plan, **reuse))
    prefilled.release()
    rope, span = bench.model.rope, slice(prefilled.span.start, prefilled.span.start + plan.num_tokens)
    rotated, values = engine.arena.keys[:, :, span], engine.arena.values[:, :, span].clone()
    keys = rope.shift(rotated, -torch.arange(plan.num_tokens))
    keys[..., : rope.rotary_dim] /= rope.scaling
    return ChunkKV(keys, values), prefilled


@pytest.mark.parametrize("family", ["llama", "llama-yarn", "phi3-partial"])
def test_corrected_tokens_move_by_the_mean_residual_of_the_recomputed_ones(family, make_bench):
    """The definition, spelled out for one chunk and a selection that does not depend on the correction."""
    bench = make_bench(family)
    a, b = bench.chunks(23, 40)
    bench.preprocess([a, b])
    plan, weight = bench.plan([a, b]), 0.6
    selection = {"method": "epic", "recompute_ratio": 0.2}
    plain, stats = held(bench, plan, **selection)
    corrected, _ = held(bench, plan, **selection, correction=weight)
    begin, taken = plan.chunks[1].start, stats.stats.recomputed_tokens
    recomputed, left = slice(begin, begin + taken), slice(begin + taken, plan.chunks[1].stop)
    stored = bench.store.get(bench.spec(b)).kv
    for fresh_of, stale, result in (
        (corrected.keys, stored.keys, corrected.keys),
        (corrected.values, stored.values, corrected.values),
    ):
        for layer in range(3):
            residual = (fresh_of[layer][:, recomputed] - stale[layer][:, :taken]).mean(1, keepdim=True)
            expected = stale[layer][:, taken:] + weight * residual
            torch.testing.assert_close(result[layer][:, left], expected, rtol=0, atol=1e-4)
    assert (corrected.values[1][:, left] - plain.values[1][:, left]).abs().max() > 0.01


def test_the_first_chunk_and_the_prefix_are_left_alone(bench, corpus):
    plan = bench.plan(corpus)
    exact = slice(0, plan.chunks[0].stop)
    plain, _ = held(bench, plan, recompute_ratio=0.3)
    corrected, _ = held(bench, plan, recompute_ratio=0.3, correction=1.0)
    assert torch.equal(corrected.keys[:, :, exact], plain.keys[:, :, exact])
    assert torch.equal(corrected.values[:, :, exact], plain.values[:, :, exact])


def test_a_chunk_none_of_whose_tokens_was_recomputed_is_left_alone(bench, corpus):
    a, b, c, _ = corpus
    plan = bench.plan([a, b, c])
    corrected, prefilled = held(bench, plan, method="epic", recompute_ratio=0.01, correction=1.0)
    assert [r.num_recomputed for r in prefilled.stats.chunks] == [0, 1, 0]
    stored, at = bench.store.get(bench.spec(c)).kv, slice(plan.chunks[2].start, plan.chunks[2].stop)
    torch.testing.assert_close(corrected.keys[:, :, at], stored.keys, rtol=0, atol=1e-5)
    assert torch.equal(corrected.values[:, :, at], stored.values)


@pytest.mark.parametrize("method", ["attention", "epic"])
def test_a_corrected_pass_is_one_step_whatever_max_batch_tokens(method, bench, corpus):
    plan = bench.plan(corpus)
    request = bench.request(plan, method=method, recompute_ratio=0.4, correction=1.0)
    once, small = (bench.prefill_beside_another(request, budget) for budget in (1024, 16))
    assert once.num_steps == small.num_steps == 1
    assert torch.equal(once.kv.keys, small.kv.keys) and torch.equal(once.kv.values, small.kv.values)
    alone = bench.tokens(bench.engine(max_batch_tokens=16).generate(request))
    assert small.event.token_id == once.event.token_id == alone[0]
    plain = bench.request(plan, method=method, recompute_ratio=0.4)
    assert bench.prefill_beside_another(plain, 16).num_steps > 1
    assert (once.kv.values - bench.prefill_beside_another(plain, 1024).kv.values).abs().max() > 0.01


def test_correction_with_everything_recomputed_equals_full_prefill(family, make_bench):
    bench = make_bench(family)
    chunks = bench.chunks(23, 40, 17)
    bench.preprocess(chunks)
    plan = bench.plan(chunks)
    logits = bench.prefill(plan, recompute_ratio=0.999999, correction=1.0).logits
    torch.testing.assert_close(logits, bench.full(plan), rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "llama-yarn", "phi3-partial"])
def test_a_correction_of_nothing_changes_nothing(family, make_bench):
    """b behind the a it was fused behind: fresh equals stored, so the residual is zero."""
    bench = make_bench(family)
    a, b = bench.chunks(40, 25)
    b = bench.behind(b, [a])
    bench.preprocess([a, b])
    plan = bench.plan([a, b])
    logits = bench.prefill(plan, method="epic", recompute_ratio=0.2, correction=1.0).logits
    torch.testing.assert_close(logits, bench.full(plan), rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", ["attention", "fusionrag", "cacheblend", "epic", "random"])
def test_requests_leave_the_stored_kv_as_it_is(method, bench, corpus):
    stored = [bench.store.get(bench.spec(c)).kv for c in corpus]
    before = [(kv.keys.clone(), kv.values.clone()) for kv in stored]
    bench.engine().generate(bench.request(bench.plan(corpus), method=method, recompute_ratio=0.4, correction=1.0))
    for chunk, kv, (keys, values) in zip(corpus, stored, before, strict=True):
        assert bench.store.get(bench.spec(chunk)).kv is kv
        assert torch.equal(kv.keys, keys) and torch.equal(kv.values, values)
