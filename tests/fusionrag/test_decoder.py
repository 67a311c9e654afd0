"""The loop over the layers: rows that nobody wants leave early, an observer may end a pass, rows wait for their KV."""

from __future__ import annotations

import pytest
import torch

from fusionrag.attention import StopForward
from fusionrag.graphs import DecodeGraphs
from fusionrag.types import AttentionObserver, RowGroup, Span


def group(bench, span, num_rows, num_logits, **more):
    draw = torch.Generator().manual_seed(span.start)
    ids = torch.randint(0, 256, (num_rows,), generator=draw)
    return RowGroup(span, ids, torch.arange(num_rows), num_logits, **more)


class Watcher(AttentionObserver):
    """Sees every layer; ends the pass after `last`, if told."""

    def __init__(self, last=None):
        self.before, self.after, self.last = [], [], last

    def before_write(self, layer, group, keys, values):
        self.before.append((layer, keys.shape[1], values.shape[1]))

    def after_write(self, layer, group, queries):
        self.after.append((layer, queries.shape[1]))
        if layer == self.last:
            raise StopForward


class Arrival:
    """Stored KV that is there already; notes what was waited for."""

    elapsed_ms = 0.0

    def __init__(self):
        self.waited = []

    def wait(self, layer):
        self.waited.append(layer)

    def wait_for_all(self):
        self.waited.append("all")


SHAPES = [(9, 1), (5, 0), (12, 12), (1, 1), (7, 3)]  # (rows, logits) of each group of one pass


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (4, 3, 2, 1, 0), (1, 0), (2, 3), (0, 2, 4)])
def test_groups_that_want_different_logits_get_what_each_gets_alone(order, family, make_bench):
    bench = make_bench(family)
    spans = [Span(20 * i, 16) for i in range(len(SHAPES))]
    groups = [group(bench, spans[i], *SHAPES[i]) for i in order]
    arenas = [bench.model.new_arena(100) for _ in range(2)]
    together = bench.model.forward(groups, arenas[0])
    alone = [bench.model.forward([g], arenas[1]) for g in groups]
    assert [len(a) for a in alone] == [g.num_logits for g in groups]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-4)
    torch.testing.assert_close(arenas[0].keys, arenas[1].keys, rtol=0, atol=1e-4)
    torch.testing.assert_close(arenas[0].values, arenas[1].values, rtol=0, atol=1e-4)


def test_the_logits_of_the_last_rows_are_those_of_all_rows(bench):
    arena = bench.model.new_arena(40)
    every = bench.model.forward([group(bench, Span(3, 30), 20, 20)], arena)
    for num_logits in (1, 2, 19):
        last = bench.model.forward([group(bench, Span(3, 30), 20, num_logits)], arena)
        torch.testing.assert_close(last, every[-num_logits:], rtol=0, atol=1e-5)


def test_rows_that_nobody_wants_leave_the_last_layer_but_their_kv_stays(bench):
    """Nothing is computed behind the last layer's keys and values, and nothing is missing there."""
    arenas = [bench.model.new_arena(40) for _ in range(2)]
    found = bench.model.forward([group(bench, Span(3, 30), 20, 0)], arenas[0])
    assert found.shape == (0, bench.model.shape.vocab_size)
    bench.model.forward([group(bench, Span(3, 30), 20, 20)], arenas[1])
    assert arenas[0].keys.equal(arenas[1].keys) and arenas[0].values.equal(arenas[1].values)
    assert arenas[0].keys[-1].abs().sum() > 0


def test_an_observer_sees_all_rows_of_its_own_group_at_every_layer(bench):
    watcher, layers = Watcher(), bench.model.shape.num_layers
    groups = [group(bench, Span(0, 10), 8, 1), group(bench, Span(20, 16), 5, 1, observer=watcher)]
    bench.model.forward(groups, bench.model.new_arena(40))
    assert watcher.before == [(layer, 5, 5) for layer in range(layers)]
    assert watcher.after == [(layer, 5) for layer in range(layers)]


@pytest.mark.parametrize("last", [0, 1])
def test_a_pass_that_its_observer_ends_leaves_the_later_layers_alone(last, bench):
    watcher, arena = Watcher(last), bench.model.new_arena(40)
    whole = bench.model.new_arena(40)
    with pytest.raises(StopForward):
        bench.model.forward([group(bench, Span(0, 10), 8, 1, observer=watcher)], arena)
    bench.model.forward([group(bench, Span(0, 10), 8, 1)], whole)
    assert watcher.after[-1] == (last, 8)
    assert arena.keys[: last + 1].equal(whole.keys[: last + 1])
    assert not arena.keys[last + 1 :].any() and not arena.values[last + 1 :].any()


def test_rows_wait_for_each_layer_once_and_in_order(bench):
    arrival = Arrival()
    bench.model.forward([group(bench, Span(0, 10), 8, 1, arrival=arrival)], bench.model.new_arena(40))
    assert arrival.waited == list(range(bench.model.shape.num_layers))


def test_a_cpu_decodes_without_graphs(bench):
    arena = bench.model.new_arena(40)
    assert DecodeGraphs(bench.model, arena).run([group(bench, Span(0, 10), 1, 1)]) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("num_requests", [1, 2, 3, 5, 8, 33])
def test_decoding_by_a_graph_gives_the_logits_of_a_plain_pass(num_requests, make_hf, make_config, tokenizer):
    from fusionrag.model import LanguageModel

    model = LanguageModel(make_hf(make_config("llama"), "eager").to("cuda"), tokenizer, "tiny")
    arenas = [model.new_arena(40 * num_requests) for _ in range(2)]
    graphs, draw = DecodeGraphs(model, arenas[0]), torch.Generator().manual_seed(1)
    spans = [Span(40 * i, 30 + i % 7) for i in range(num_requests)]
    for arena in arenas:
        model.forward([RowGroup(s, *model.rows(range(5 + i % 11)), 1) for i, s in enumerate(spans)], arena)
    for step in range(3):
        ids = torch.randint(0, 256, (num_requests, 1), generator=draw).tolist()
        rows = [RowGroup(s, *model.rows(ids[i], 5 + i % 11 + step), 1) for i, s in enumerate(spans)]
        found = graphs.run(rows)
        assert (found is None) == (num_requests > 32)
        expected = model.forward(rows, arenas[1])
        if found is not None:
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
            torch.testing.assert_close(arenas[0].keys, arenas[1].keys, rtol=0, atol=1e-4)
        else:
            model.forward(rows, arenas[0])
