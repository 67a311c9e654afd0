"""Every scorer against its definition, spelled out slowly; and what a scorer may touch: the tail's slots alone."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from fusionrag.config import ReuseConfig
from fusionrag.errors import ConfigError
from fusionrag.layout import plan_candidates, stitch_
from fusionrag.loading import CpuLoader
from fusionrag.reprocess import probe
from fusionrag.reprocess.probe import ScoreInputs, parse_layers
from fusionrag.stitch import CaptureKV, rotated
from fusionrag.types import AttentionObserver, RowGroup


def lay(bench, *lengths, num_related=1, **reuse):
    """The inputs of a scorer for a stitched request that none has seen yet."""
    chunks = bench.with_neighbours(bench.chunks(*lengths), num_related)
    bench.preprocess(chunks)
    plan, engine, config = bench.plan(chunks, "who was where"), bench.engine(), ReuseConfig(**reuse)
    engine.arena.allocate(7)  # so that slots are not positions
    span = engine.arena.allocate(plan.num_tokens + 5)
    names, prefix = engine.prefix(plan.prefix.token_ids)
    loader, candidates = CpuLoader(bench.model, bench.store), plan_candidates(names, plan, config)
    prefix = rotated(bench.model.rope, prefix)
    stitched = stitch_(bench.model, loader, engine.arena, span, plan, candidates, prefix, send=lambda: None)
    return ScoreInputs(bench.model, engine.arena, span, plan, stitched.candidates, config)


class Recorder(AttentionObserver):
    """The rotated queries of a group's rows, layer by layer."""

    def __init__(self):
        self.queries = []

    def after_write(self, layer, group, queries):
        self.queries.append(queries.clone())


def tail_queries(inputs):
    """(L, H, R, D) of the tail's rows over the stitched cache."""
    recorder, tail = Recorder(), inputs.plan.tail
    ids, positions = inputs.model.rows(tail.token_ids, tail.start)
    inputs.model.forward([RowGroup(inputs.span, ids, positions, observer=recorder)], inputs.arena)
    return torch.stack(recorder.queries)


# --- attention --------------------------------------------------------------------------------------------------------


def naive_mass(queries, keys, first_position):
    num_heads, num_rows, head_dim = queries.shape
    per_kv_head, mass = num_heads // keys.shape[0], [0.0] * keys.shape[1]
    for head in range(num_heads):
        for row in range(num_rows):
            visible = range(min(first_position + row + 1, keys.shape[1]))
            scores = [float(queries[head, row] @ keys[head // per_kv_head, j]) / math.sqrt(head_dim) for j in visible]
            total = sum(math.exp(score - max(scores)) for score in scores)
            for j in visible:
                mass[j] += math.exp(scores[j] - max(scores)) / total
    return torch.tensor(mass)


@pytest.mark.parametrize("probe_layers", ["all", "late", "third-quarter", "last", "0-1", "0,2"])
@pytest.mark.parametrize("probe_rows", ["tail", "question"])
def test_attention_scores_are_the_mean_over_the_configured_layers(probe_layers, probe_rows, bench):
    inputs = lay(bench, 11, 14, 9, probe_layers=probe_layers, probe_rows=probe_rows, normalize_layers=False)
    queries, plan = tail_queries(inputs), inputs.plan
    first, last = plan.question if probe_rows == "question" else (plan.tail.start, plan.num_tokens)
    layers, expected = parse_layers(probe_layers, 3), torch.zeros(plan.num_tokens)
    for layer in layers:
        keys, _ = inputs.arena.view(layer, inputs.span)
        rows = queries[layer][:, first - plan.tail.start : last - plan.tail.start]
        expected[:last] += naive_mass(rows, keys[:, :last], first) / len(layers)
    torch.testing.assert_close(probe.attention_scores(inputs), expected, rtol=0, atol=1e-4)


def test_attention_scores_over_an_exact_cache_are_the_models_own_attention(bench, make_hf, make_config):
    """One chunk behind the prefix is exact, so stock transformers pays it the same attention."""
    inputs = lay(bench, 30, num_related=0, probe_layers="all", normalize_layers=False)
    hf = make_hf(make_config("llama"), "eager")
    with torch.no_grad():
        attentions = hf(torch.tensor([inputs.plan.token_ids]), output_attentions=True).attentions
    tail = inputs.plan.tail.start
    expected = torch.stack(attentions)[:, 0, :, tail:].sum((1, 2)).mean(0)  # (L, H, R, N) → (N,)
    torch.testing.assert_close(probe.attention_scores(inputs), expected, rtol=0, atol=1e-4)


def test_normalised_layers_pay_the_candidates_the_same_mass(bench):
    inputs = lay(bench, 11, 14, 9, probe_layers="all", normalize_layers=True)
    per_layer = [
        probe.attention_scores(replace(inputs, config=replace(inputs.config, probe_layers=str(layer))))
        for layer in range(3)
    ]
    for importance in per_layer:
        assert float(importance[inputs.candidates].sum()) == pytest.approx(1, abs=1e-5)
    mean = torch.stack(per_layer).mean(0)
    torch.testing.assert_close(probe.attention_scores(inputs), mean, rtol=0, atol=1e-5)


# --- the published rule -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "llama-yarn", "phi3-partial", "qwen3"])
@pytest.mark.parametrize("probe_rows", ["tail", "question"])
def test_fusionrag_scores_equal_the_published_rule_spelled_out(family, probe_rows, make_bench):
    """Last layer; each chunk's keys rotated from storage to right behind the prefix; one softmax per chunk."""
    bench = make_bench(family)
    inputs = lay(bench, 11, 14, 9, num_related=0, probe_rows=probe_rows)
    model, plan = inputs.model, inputs.plan
    first, last = inputs.probe_rows
    queries = tail_queries(inputs)[-1][:, first - plan.tail.start : last - plan.tail.start]
    expected = torch.zeros(plan.num_tokens)
    for segment in plan.chunks:
        unrotated = bench.store.get(bench.spec(segment.chunk)).kv.keys[-1]
        canonical = plan.prefix.num_tokens + torch.arange(segment.num_tokens)
        keys = model.rope.rotate(unrotated, *model.rope.tables(canonical))
        expected[segment.start : segment.stop] = naive_mass(queries, keys, segment.num_tokens)  # all keys are visible
    torch.testing.assert_close(probe.fusionrag_scores(inputs), expected, rtol=0, atol=1e-3)
    for segment in plan.chunks:
        mass = float(expected[segment.start : segment.stop].sum())
        assert mass == pytest.approx((last - first) * model.shape.num_heads, rel=1e-4)


# --- deviation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "llama-yarn", "phi3-partial"])
def test_cacheblend_scores_equal_the_deviation_from_full_prefill_at_layer_1(family, make_bench):
    bench = make_bench(family)
    inputs = lay(bench, 11, 14, 9, num_related=0)
    model, plan = inputs.model, inputs.plan
    capture, arena = CaptureKV(), model.new_arena(plan.num_tokens)
    ids, positions = model.rows(plan.token_ids)
    span = arena.allocate(plan.num_tokens)
    model.forward([RowGroup(span, ids, positions, observer=capture)], arena)
    fresh = capture.chunk_kv()
    by_values, by_both = probe.cacheblend_scores(inputs), probe.cacheblend_gradual_scores(inputs)
    for segment in plan.chunks:
        stored, at = bench.store.get(bench.spec(segment.chunk)).kv, slice(segment.start, segment.stop)
        keys, values = fresh.keys[1][:, at] - stored.keys[1], fresh.values[1][:, at] - stored.values[1]
        torch.testing.assert_close(by_values[at], values.pow(2).sum((0, 2)), rtol=1e-4, atol=1e-4)
        expected = (model.rope.scaling * keys).pow(2).sum((0, 2)) + values.pow(2).sum((0, 2))
        torch.testing.assert_close(by_both[at], expected, rtol=1e-4, atol=1e-4)
        # keys are compared as attention sees them: rotated, which keeps distances, and scaled (YaRN)
        assert (expected.max() > 0.1) == (segment.start > plan.prefix.stop)  # the first chunk deviates nowhere


def test_cacheblend_scores_leave_the_arena_as_it_was(bench):
    inputs = lay(bench, 11, 14, 9)
    before = inputs.arena.keys.clone(), inputs.arena.values.clone()
    probe.cacheblend_gradual_scores(inputs)
    for now, then in zip((inputs.arena.keys, inputs.arena.values), before, strict=True):
        torch.testing.assert_close(now[0], then[0], rtol=0, atol=1e-5)  # layer 0 is the same in every context
        assert torch.equal(now[1:], then[1:])


@pytest.mark.parametrize("scorer", [probe.attention_scores, probe.fusionrag_scores, probe.epic_scores])
def test_other_scores_touch_nothing_but_the_tails_slots(scorer, bench):
    inputs = lay(bench, 11, 14, 9)
    before = inputs.arena.keys.clone(), inputs.arena.values.clone()
    scorer(inputs)
    tail = slice(inputs.span.start + inputs.plan.tail.start, inputs.span.start + inputs.plan.num_tokens)
    for now, then in zip((inputs.arena.keys, inputs.arena.values), before, strict=True):
        then[:, :, tail] = now[:, :, tail]
        assert torch.equal(now, then)


# --- place and chance -------------------------------------------------------------------------------------------------


def test_epic_scores_fall_from_the_beginning_of_every_chunk(bench):
    inputs = lay(bench, 11, 14, 9)
    importance = probe.epic_scores(inputs)
    for segment in inputs.plan.chunks:
        scores = importance[segment.start : segment.stop]
        assert scores[0] == 0 and (scores.diff() == -1).all()


def test_random_scores_are_the_seeds_alone(bench):
    inputs = lay(bench, 11, 14, 9)
    one, again, other = (probe.random_scores(replace(inputs, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)
    torch.manual_seed(5)  # the global generator has no part in it
    assert torch.equal(one, probe.random_scores(replace(inputs, seed=1)))


# --- layers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("all", range(30)),
        ("late", range(15, 30)),
        ("third-quarter", range(15, 23)),
        ("last", [29]),
        ("0", [0]),
        ("8-19,25", [*range(8, 20), 25]),
        (" 1 , 3 - 4 ", [1, 3, 4]),
        ("3-3,2-4", [2, 3, 4]),
    ],
)
def test_layers_are_named_or_spelled_as_ranges(text, expected):
    assert parse_layers(text, 30) == frozenset(expected)


def test_the_upper_half_of_an_odd_number_of_layers_is_the_larger():
    assert parse_layers("late", 3) == {1, 2}


@pytest.mark.parametrize(("num_layers", "expected"), [(1, [0]), (2, [1]), (3, [1, 2]), (4, [2]), (28, range(14, 21))])
def test_the_third_quarter_is_never_empty(num_layers, expected):
    assert parse_layers("third-quarter", num_layers) == frozenset(expected)


@pytest.mark.parametrize("text", ["", "every", "1,", ",1", "1-2-3", "-1", "8-", "a-b", "1.5", "1;2", "²", "all,1"])
def test_layers_that_cannot_be_read_are_refused_by_name(text):
    with pytest.raises(
        ConfigError, match=r"probe_layers: .*expected all, late, third-quarter, last or ranges"
    ) as error:
        parse_layers(text, 30)
    assert error.value.field == "probe_layers"


@pytest.mark.parametrize("text", ["30", "0-30", "5,99", "9-8", "9-8,1", "0-99999999999"])
def test_layers_that_the_model_lacks_are_refused_by_name(text):
    with pytest.raises(ConfigError, match=r"probe_layers: .*the model has layers 0 to 29"):
        parse_layers(text, 30)
