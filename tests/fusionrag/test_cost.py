"""What full prefill would have taken: predicted from passes that ran here."""

from __future__ import annotations

import pytest

from fusionrag.cost import PrefillClock
from fusionrag.types import RowGroup, Span


def group(bench, positions):
    ids, _ = bench.model.rows([1] * len(positions))
    return RowGroup(Span(0, max(positions) + 1), ids, ids.new_tensor(positions))


def test_flops_are_those_of_the_matrix_products_and_of_causal_attention(bench):
    clock, shape = PrefillClock(bench.model), bench.model.shape
    weights = bench.model.num_active_parameters
    pair = 4 * shape.num_layers * shape.num_heads * shape.head_dim
    assert clock.flops(0, 1) == 2 * weights + pair
    assert clock.flops(5, 7) == 4 * weights + pair * (6 + 7)
    assert clock.flops(0, 10) == clock.flops(0, 4) + clock.flops(4, 10)


def test_parameters_are_those_of_the_layers_alone(bench):
    inside = [w.numel() for n, w in bench.model._hf.named_parameters() if ".layers." in n and w.ndim > 1]
    assert bench.model.num_active_parameters == sum(inside)


def test_nothing_is_predicted_before_a_pass_was_measured(bench):
    clock = PrefillClock(bench.model)
    clock.observe([group(bench, list(range(0, 400, 2)))], 1.0)  # scattered rows
    clock.observe([group(bench, list(range(20)))], 1.0)  # too few
    assert clock.prefill_ms(100) is None


def test_a_pass_that_was_measured_is_predicted_as_it_was(bench):
    clock = PrefillClock(bench.model)
    clock.observe([group(bench, list(range(200)))], 0.5)
    assert clock.prefill_ms(200) == pytest.approx(500)
    for _ in range(50):
        clock.observe([group(bench, list(range(200)))], 0.1)
    assert clock.prefill_ms(200) == pytest.approx(100, rel=0.01)


def test_a_calibrated_engine_predicts_from_its_first_request_on(bench):
    engine = bench.engine()
    engine.calibrate()
    stats = engine.generate(bench.request(bench.plan(bench.chunks(30, 30))))[-1].stats
    assert stats.predicted_full_ms > 0
    assert bench.engine().generate(bench.request(bench.plan(bench.chunks(3))))[-1].stats.predicted_full_ms is None
