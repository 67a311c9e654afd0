"""A rehearsal runs everything and leaves nothing behind."""

from __future__ import annotations

import time

import pytest
import torch

from fusionrag.config import EngineConfig, ReuseConfig
from fusionrag.engine import Engine
from fusionrag.model import LanguageModel
from fusionrag.sampling import SamplingParams
from fusionrag.store import MemoryStore
from fusionrag.warm_up import warm_up


class Untouched(MemoryStore):
    """A store that nobody may look at."""

    def get(self, spec):
        raise AssertionError("the rehearsal has a store of its own")

    recall = put = contains = delete = get


def test_it_leaves_no_kv_no_slots_and_no_rates_behind(bench):
    engine = bench.engine(Untouched(), route="auto")
    warm_up(engine, bench.prompts.prefix_ids, ReuseConfig())
    assert engine.arena.num_free == engine.arena.num_slots and not engine.has_work
    engine.store = bench.store
    chunks = bench.chunks(40, 30)
    assert isinstance(engine.store, MemoryStore) and list(engine.store.digests()) == []
    stats = engine._router.choose(bench.plan(chunks), [None, None], 0.15)
    assert stats.predicted_ms == {}, "the router has seen nothing"


def test_answers_behind_it_are_what_they_are_without_it(bench):
    chunks = bench.with_neighbours(bench.chunks(60, 50, 40), 1)
    bench.preprocess(chunks)
    request = bench.request(bench.plan(chunks), recompute_ratio=0.3)
    warm = bench.engine()
    warm_up(warm, bench.prompts.prefix_ids, ReuseConfig())
    assert bench.tokens(warm.generate(request)) == bench.tokens(bench.engine().generate(request))


def test_it_goes_through_probe_recompute_and_decode(bench):
    """On KV as its store keeps it, of which it finds all."""
    engine, seen = bench.engine(), []
    forward = engine.model.forward

    def watched(groups, arena):
        seen.extend((g.num_rows, g.num_logits, g.observer is not None) for g in groups)
        return forward(groups, arena)

    engine.model.forward = watched
    try:
        warm_up(engine, bench.prompts.prefix_ids, ReuseConfig(recompute_ratio=0.25))
    finally:
        del engine.model.forward
    length = (bench.model.max_model_len - len(bench.prompts.prefix_ids) - 35) // 4
    prefix, *raw, probe, recompute, first, second = seen
    assert prefix == (len(bench.prompts.prefix_ids), 0, True)
    assert raw == [(length, 0, True)] * 4
    assert probe == (32, 0, True)
    assert recompute[0] == 32 + length and recompute[1:] == (1, True)  # a quarter of four chunks; and it corrects
    assert first == second == (1, 1, False)


@pytest.mark.parametrize("arena_tokens", [16, 60, 200])
def test_an_engine_that_is_too_small_for_it_is_none_the_worse(arena_tokens, bench):
    engine = bench.engine(arena_tokens=arena_tokens)
    warm_up(engine, bench.prompts.prefix_ids, ReuseConfig())
    assert engine.arena.num_free == arena_tokens


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_first_answer_behind_it_waits_for_no_compiler(make_hf, make_config, bench, tokenizer):
    hf = make_hf(make_config("llama", hidden_size=96, head_dim=16, max_position_embeddings=4096), "eager")
    model = LanguageModel(hf.to("cuda", torch.bfloat16), tokenizer, "tiny")
    engine = Engine(model, MemoryStore(is_decoded=False), EngineConfig(arena_tokens=4096))
    warm_up(engine, bench.prompts.prefix_ids, ReuseConfig())
    request = bench.request(bench.plan(bench.chunks(400, 300)), sampling=SamplingParams(max_tokens=4, ignore_eos=True))
    begin = time.perf_counter()
    engine.generate(request)
    assert time.perf_counter() - begin < 1.0
