"""Selected tokens that leave the recompute pass below the top: what that changes, and what stays as it is stored."""

from __future__ import annotations

import pytest
import torch

from fusionrag.attention import ForwardStep
from fusionrag.config import ReuseConfig

NUM_LAYERS = 3  # of the tests' models


def held(bench, plan, **reuse):
    """What the request's span holds before its first token: (keys, values) (L, G, N, D), and the prefilled request."""
    engine = bench.engine()
    prefilled = engine.prefill(bench.request(plan, **reuse))
    prefilled.release()
    span = slice(prefilled.span.start, prefilled.span.start + plan.num_tokens)
    return engine.arena.keys[:, :, span].clone(), engine.arena.values[:, :, span].clone(), prefilled


@pytest.mark.parametrize("correction", [0.0, 1.0])
@pytest.mark.parametrize("num_layers", range(1, NUM_LAYERS + 1))
@pytest.mark.parametrize("family", ["llama", "mistral-sliding", "qwen3-moe"])
def test_lower_layers_are_as_recomputed_and_upper_ones_as_stored(family, num_layers, correction, make_bench):
    bench = make_bench(family)
    chunks = bench.chunks(23, 40, 17)
    bench.preprocess(chunks)
    plan = bench.plan(chunks)
    asked = {"recompute_ratio": 0.4, "correction": correction, "recompute_depth": num_layers / NUM_LAYERS}
    *found, lower = held(bench, plan, **asked)
    *whole, full_depth = held(bench, plan, **(asked | {"recompute_depth": 1.0}))
    *stored, _ = held(bench, plan, method="reuse")
    tail = plan.tail.start
    for own, recomputed, before in zip(found, whole, stored, strict=True):
        torch.testing.assert_close(own[:num_layers], recomputed[:num_layers], rtol=0, atol=1e-5)
        assert torch.equal(own[num_layers:, :, :tail], before[num_layers:, :, :tail])
        if num_layers < NUM_LAYERS:
            assert (own[num_layers:, :, :tail] - recomputed[num_layers:, :, :tail]).abs().max() > 0.01
    assert lower.stats.recomputed_tokens == full_depth.stats.recomputed_tokens > 0
    if num_layers == NUM_LAYERS:
        torch.testing.assert_close(lower.logits, full_depth.logits, rtol=0, atol=1e-5)


def test_full_prefill_runs_all_layers(bench):
    chunks = bench.chunks(23, 40)
    bench.preprocess(chunks)
    plan = bench.plan(chunks)
    assert torch.equal(bench.prefill(plan, recompute_ratio=1.0, recompute_depth=0.1).logits, bench.full(plan))


@pytest.mark.parametrize(
    ("share", "num_layers", "expected"), [(1.0, 30, 30), (0.85, 28, 24), (0.1, 3, 1), (0.7, 10, 7)]
)
def test_a_share_of_the_layers_is_rounded_up(share, num_layers, expected):
    assert ReuseConfig(recompute_depth=share).recomputed_layers(num_layers) == expected


@pytest.mark.parametrize("num_layers", range(1, NUM_LAYERS + 1))
def test_what_comes_out_of_the_last_recomputed_layer_is_not_computed(num_layers, bench, monkeypatch):
    chunks = bench.chunks(23, 40, 17)
    bench.preprocess(chunks)
    plan, attended = bench.plan(chunks), []
    attend = ForwardStep.attend
    monkeypatch.setattr(
        ForwardStep,
        "attend",
        lambda step, layer, queries, *args: (
            attended.append((layer, len(queries))) or attend(step, layer, queries, *args)
        ),
    )
    asked = bench.request(plan, method="random", recompute_ratio=0.4, recompute_depth=num_layers / NUM_LAYERS)
    prefilled = bench.engine().prefill(asked)
    prefilled.release()
    num_tail, num_selected = plan.tail.num_tokens, prefilled.stats.recomputed_tokens
    expected = [num_selected + num_tail] * (num_layers - 1) + [num_tail] * (NUM_LAYERS - num_layers) + [1]
    assert attended[-NUM_LAYERS:] == list(enumerate(expected))
