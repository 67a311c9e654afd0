"""Rows of many requests share a pass, and a request's rows may be spread over many: neither changes an answer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fusionrag.sampling import SamplingParams

SELECTORS = ["attention", "fusionrag", "cacheblend", "epic", "random"]


@pytest.fixture
def corpus(bench):
    *chunks, missing = bench.chunks(23, 40, 17, 31, 9)
    chunks = bench.with_neighbours(chunks, num_related=2)
    bench.preprocess(chunks)
    return [*chunks, missing]


@pytest.fixture
def requests(bench, corpus):
    """Different methods, ratios, lengths, ways to sample; one is atomic, one computes a chunk in place."""
    a, b, c, d, missing = corpus
    greedy = SamplingParams(max_tokens=12, ignore_eos=True)
    seeded = replace(greedy, temperature=1.0, seed=7)
    return [
        bench.request(bench.plan([a, b, c, d], "what is first"), "attention", greedy, recompute_ratio=0.2),
        bench.request(bench.plan([d, b], "x"), "full", replace(seeded, max_tokens=20), method="full"),
        bench.request(bench.plan([c, a, d]), "reuse", replace(seeded, top_p=0.9, seed=8), method="reuse"),
        bench.request(bench.plan([b, a, c]), "corrected", greedy, correction=0.7, recompute_ratio=0.5),
        bench.request(bench.plan([a, d, c]), "lower", greedy, recompute_depth=0.3, recompute_ratio=0.5),
        bench.request(bench.plan([a, missing, b]), "missing", greedy, method="epic", recompute_ratio=0.4),
        bench.request(bench.plan([d, c, b, a]), "cacheblend", seeded, method="cacheblend", recompute_ratio=0.3),
        bench.request(bench.plan([b, c]), "canonical", greedy, method="fusionrag", recompute_ratio=0.9),
        bench.request(bench.text_plan(range(60, 100)), "text", replace(seeded, repetition_penalty=1.3)),
    ]


@pytest.fixture
def alone(bench, requests):
    """The tokens that each request gets when nothing runs beside it."""
    return {r.request_id: bench.tokens(bench.engine().generate(r), r.request_id) for r in requests}


@pytest.mark.parametrize("config", [{}, {"max_batch_tokens": 16}, {"max_batch_tokens": 50, "max_num_requests": 3}])
def test_requests_decoded_together_get_the_tokens_that_each_gets_alone(config, bench, requests, alone):
    engine = bench.engine(arena_tokens=1024, **config)
    events = bench.run(engine, requests)
    assert {r.request_id: bench.tokens(events, r.request_id) for r in requests} == alone
    assert {len(set(tokens)) > 3 for tokens in alone.values()} == {True}  # answers that say something


def test_a_request_that_comes_late_gets_the_tokens_that_it_gets_alone(bench, requests, alone):
    engine, events = bench.engine(max_batch_tokens=32), []
    for request in requests:
        engine.submit(request)
        events += [event for _ in range(4) for event in engine.step()]
    while engine.has_work:
        events += engine.step()
    assert {r.request_id: bench.tokens(events, r.request_id) for r in requests} == alone


def test_equal_requests_side_by_side_get_equal_tokens(bench, requests):
    twins = [replace(requests[0], request_id=name) for name in ("one", "two", "three")]
    events = bench.run(bench.engine(max_batch_tokens=48), twins)
    one, two, three = (bench.tokens(events, t.request_id) for t in twins)
    assert one == two == three and len(one) == 12


def test_seeds_and_nothing_else_tell_sampled_answers_apart(bench, requests):
    sampled = replace(requests[1].sampling, temperature=2.0)
    tokens = [
        bench.tokens(bench.engine().generate(replace(requests[1], sampling=replace(sampled, seed=seed))), "full")
        for seed in (1, 1, 2)
    ]
    assert tokens[0] == tokens[1] != tokens[2]


def assert_same_first_token(one, other):
    """What the slots hold at the last layer comes of everything that went before."""
    assert one.event.token_id == other.event.token_id
    assert one.event.stats.chunks == other.event.stats.chunks
    expected = (other.kv.keys, other.kv.values)
    torch.testing.assert_close((one.kv.keys, one.kv.values), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recompute_ratio", [0.0, 0.15, 0.6, 1.0])
@pytest.mark.parametrize("method", SELECTORS)
def test_recompute_in_one_step_equals_recompute_in_several(method, recompute_ratio, bench, corpus):
    """So does computing a missing chunk."""
    request = bench.request(bench.plan(corpus), method=method, recompute_ratio=recompute_ratio)
    once, pieces = (bench.prefill_beside_another(request, budget) for budget in (1024, 16))
    assert once.num_steps <= 2 < pieces.num_steps
    assert_same_first_token(pieces, once)


@pytest.mark.parametrize("recompute_depth", [0.3, 0.6])
def test_rows_that_leave_may_be_spread_over_several_steps(recompute_depth, bench, corpus):
    request = bench.request(bench.plan(corpus), recompute_ratio=0.6, recompute_depth=recompute_depth)
    once, pieces = (bench.prefill_beside_another(request, budget) for budget in (1024, 16))
    assert once.num_steps <= 2 < pieces.num_steps
    assert_same_first_token(pieces, once)


@pytest.mark.parametrize("recompute_ratio", [0.5, 1.0])
def test_recompute_in_several_steps_equals_one_with_a_sliding_window(recompute_ratio, make_bench):
    bench = make_bench("mistral-sliding")
    chunks = bench.chunks(23, 40, 17)
    bench.preprocess(chunks)
    request = bench.request(bench.plan(chunks), recompute_ratio=recompute_ratio)
    once, pieces = (bench.prefill_beside_another(request, budget) for budget in (1024, 16))
    assert once.num_steps == 1 < pieces.num_steps
    assert_same_first_token(pieces, once)


def test_a_prefill_that_runs_alone_is_one_step(bench, corpus):
    """There is no stream to keep flowing, and one pass is the fastest."""
    engine = bench.engine(max_batch_tokens=16)
    engine.submit(bench.request(bench.plan(corpus), method="full"))
    assert [e.stats.completion_tokens for e in engine.step()] == [1]


def test_every_way_through_the_engine_gives_the_same_first_token(bench, requests):
    """`prefill`, which evaluation uses, and `step`, which serves."""
    for request in requests:
        if request.sampling.greedy:
            prefilled = bench.engine().prefill(request)
            prefilled.release()
            first = bench.tokens(bench.engine().generate(request), request.request_id)[0]
            assert int(prefilled.logits.argmax()) == first


def test_prefill_then_extend_gives_the_logits_of_the_longer_prompt(bench, corpus):
    plan = bench.plan(corpus)
    answer = [70, 80, 90, 100]
    with_answer = bench.text_plan([*plan.token_ids, *answer])
    prefilled = bench.engine().prefill(bench.request(plan, method="full"))
    one_by_one = [prefilled.extend([token], i)[0] for i, token in enumerate(answer)]
    at_once = prefilled.extend(answer)
    prefilled.release()
    torch.testing.assert_close(torch.stack(one_by_one), at_once, rtol=0, atol=1e-4)
    torch.testing.assert_close(at_once[-1], bench.full(with_answer), rtol=0, atol=1e-4)
