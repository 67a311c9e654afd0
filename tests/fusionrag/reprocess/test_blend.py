"""CacheBlend's gradual filter: rows that are dropped leave no trace, and as many are kept as the schedule says."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from fusionrag.reprocess import blend


@pytest.fixture
def corpus(bench):
    chunks = bench.chunks(23, 40, 31)
    bench.preprocess(chunks)
    return chunks


def fresh_positions(bench, plan, layer, **reuse):
    """Positions of chunk tokens whose values at `layer` are not the stored ones when the first token is due."""
    engine = bench.engine()
    prefilled = engine.prefill(bench.request(plan, **reuse))
    span = prefilled.span
    found = set()
    for segment in plan.chunks[1:]:
        stored = bench.store.get(bench.spec(segment.chunk)).kv.values[layer]
        held = engine.arena.values[layer, :, span.start + segment.start : span.start + segment.stop]
        changed = (held - stored).abs().amax((0, 2)) > 0
        found |= {segment.start + i for i in torch.nonzero(changed)[:, 0].tolist()}
    prefilled.release()
    return found


def test_fewer_rows_are_kept_the_deeper_the_layer_and_the_others_are_as_stored(bench, corpus):
    plan, ratio = bench.plan(corpus), 0.3
    num_layers, budget = bench.model.shape.num_layers, round(0.3 * 94)
    kept = [
        fresh_positions(bench, plan, layer, method="cacheblend_gradual", recompute_ratio=ratio)
        for layer in range(1, num_layers)
    ]
    assert all(deeper <= shallower for shallower, deeper in pairwise(kept))
    assert len(kept[0]) == pytest.approx(blend.START * budget, abs=1)
    assert len(kept[-1]) == pytest.approx(blend.STOP * budget, abs=1)


def test_a_filter_that_drops_nothing_is_a_plain_recompute(bench, corpus, monkeypatch):
    plan = bench.plan(corpus)
    monkeypatch.setattr(blend, "START", 1.0)
    monkeypatch.setattr(blend, "STOP", 1.0)
    gradual = bench.prefill(plan, method="cacheblend_gradual", recompute_ratio=0.999)
    torch.testing.assert_close(gradual.logits, bench.full(plan), rtol=0, atol=1e-4)
