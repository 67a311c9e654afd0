"""A probe and a recompute in buffers that stay give what passes of their own size give, captured or not."""

from __future__ import annotations

import pytest
import torch

from fusionrag.config import EngineConfig
from fusionrag.engine import Engine
from fusionrag.model import LanguageModel
from fusionrag.prompt import PromptBuilder
from fusionrag.store import MemoryStore
from tests.conftest import PROMPT, Bench

WAYS = [
    {"recompute_ratio": 0.0},
    {"recompute_ratio": 0.2, "correction": 0.0},
    {"recompute_ratio": 0.2},
    {"recompute_ratio": 0.4, "recompute_depth": 0.5},  # 2 of 3 layers: in the second piece
    {"recompute_ratio": 0.4, "recompute_depth": 0.3, "correction": 0.0},  # 1: in the first
    {"recompute_ratio": 0.4, "probe_layers": "0-1", "normalize_layers": False, "probe_rows": "question"},
    {"recompute_ratio": 0.2, "probe_layers": "all", "probe_rows": "tail"},
    {"recompute_ratio": 0.2, "method": "fusionrag"},
]


@pytest.fixture(params=["llama", "qwen2-sliding", "phi3-partial"])
def bench(request, kernel_device, make_hf, make_config, tokenizer):
    if kernel_device == "cpu" and request.param != "llama":
        pytest.skip("takes half a minute in the interpreter")
    hf = make_hf(make_config(request.param, hidden_size=96, head_dim=16), "eager")
    model = LanguageModel(hf.to(kernel_device), tokenizer, "tiny")
    return Bench(model, PromptBuilder(tokenizer, PROMPT), MemoryStore(is_decoded=kernel_device == "cpu"))


@pytest.fixture
def engines(bench):
    """One whose passes have buffers that stay, one whose passes have none."""
    both = [Engine(bench.model, bench.store, EngineConfig(arena_tokens=1024, route="reuse")) for _ in range(2)]
    for engine, is_on in zip(both, (True, False), strict=True):
        engine._passes.is_on = is_on  # in the interpreter they are run piece by piece, never captured
    return both


def first_token(bench, engine, plan, **reuse):
    prefilled = engine.prefill(bench.request(plan, **reuse))
    prefilled.release()
    return prefilled.logits, prefilled.stats


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of rows that only fill up: undefined, and seen by nobody
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_as_a_pass_of_its_own_size(bench, engines, way, kernel_device):
    static, plain = engines
    prompts = [(30, 24), (11, 25, 18)] if kernel_device == "cpu" else [(40, 64, 33), (21, 50, 40, 7), (90, 80, 70)]
    for seed, lengths in enumerate(prompts):  # the later ones find the buffers of the first
        chunks = bench.chunks(*lengths, seed=seed)
        bench.preprocess(chunks)
        plan = bench.plan(chunks, "who is it" + " now" * seed)
        expected, expected_stats = first_token(bench, plain, plan, **way)
        for _ in range(1 if kernel_device == "cpu" else 2):
            found, stats = first_token(bench, static, plan, **way)
            torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)
            assert stats.recomputed_tokens == expected_stats.recomputed_tokens
            assert [c.num_recomputed for c in stats.chunks] == [c.num_recomputed for c in expected_stats.chunks]
            if kernel_device == "cuda":
                static.rest()  # the second time, and for later prompts of that size, graphs are replayed
    assert len(static._passes._passes) > 0
    if kernel_device == "cuda":
        assert all(p.replay.is_captured for p in static._passes._passes.values())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_nothing_outside_the_span_is_written(bench, engines):
    """Rows that only fill up are written nowhere."""
    engine, chunks = engines[0], bench.chunks(30, 24)
    bench.preprocess(chunks)
    engine.arena.keys.fill_(7.0)
    engine.arena.values.fill_(7.0)
    before = engine.arena.allocate(13)
    prefilled = engine.prefill(bench.request(bench.plan(chunks), recompute_ratio=0.2))
    assert prefilled.span.start >= before.stop
    outside = torch.ones(engine.arena.num_slots, dtype=torch.bool)
    outside[prefilled.span.start : prefilled.span.start + prefilled.num_tokens] = False
    for cache in (engine.arena.keys, engine.arena.values):
        assert (cache[:, :, outside.to(cache.device)] == 7.0).all()
    prefilled.release()
