"""The metrics agree with their published definitions, with values worked out by hand, and with their bounds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts.evaluation.metrics import (
    Interval,
    bootstrap_mean,
    bootstrap_ratio,
    exact_match,
    f1_score,
    kl_to_full,
    normalize_answer,
    normalized_f1,
    paired_bootstrap,
)

WORDS = st.sampled_from(["the", "a", "Rome", "rome,", "1921", "born", "in", "King's", "U.S.", "—", "Öl"])
TEXT = st.lists(WORDS, max_size=6).map(" ".join)
LOGITS = st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=8)
VALUES = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=30)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Denver Broncos", "denver broncos"),
        ("  A  quick,\tbrown fox! ", "quick brown fox"),
        ("an apple and another", "apple and another"),
        ("Levi's Stadium in Santa Clara, California.", "levis stadium in santa clara california"),
        ("U.S.A.", "usa"),
        ("a.", ""),
        ("theatre", "theatre"),
        ("20\u201318", "20\u201318"),  # SQuAD removes ASCII punctuation only: the en dash stays
    ],
)
def test_normalisation_follows_squad(text: str, normal: str) -> None:
    assert normalize_answer(text) == normal


@given(TEXT)
def test_normalisation_is_idempotent(text: str) -> None:
    assert normalize_answer(normalize_answer(text)) == normalize_answer(text)


@pytest.mark.parametrize(
    ("prediction", "answers", "f1", "em"),
    [
        ("The Santa Clara", ["Santa Clara, California"], 0.8, 0.0),  # precision 2/2, recall 2/3
        ("santa clara california.", ["Santa Clara, California"], 1.0, 1.0),
        ("Carolina Panthers", ["Denver Broncos"], 0.0, 0.0),
        ("Broncos", ["Denver Broncos", "the Broncos", "Panthers"], 1.0, 1.0),  # the maximum over the golds
        ("to be or not to be", ["to be"], 0.5, 0.0),  # each gold token counts once: precision 2/6, recall 2/2
        ("the", ["a"], 1.0, 1.0),  # nothing is left of either
        ("the", ["Rome"], 0.0, 0.0),
        ("", ["Rome"], 0.0, 0.0),
    ],
)
def test_f1_and_exact_match_as_worked_out_by_hand(prediction: str, answers: list[str], f1: float, em: float) -> None:
    assert f1_score(prediction, answers) == pytest.approx(f1)
    assert exact_match(prediction, answers) == em


@given(TEXT, TEXT)
def test_f1_is_symmetric_bounded_and_one_at_least_on_exact_match(a: str, b: str) -> None:
    assert f1_score(a, [b]) == f1_score(b, [a])
    assert exact_match(a, [b]) <= f1_score(a, [b]) <= 1
    assert f1_score(a, [a]) == exact_match(a, [a]) == 1


@given(TEXT, st.lists(TEXT, min_size=1, max_size=3), TEXT)
def test_another_gold_answer_never_lowers_a_score(prediction: str, answers: list[str], other: str) -> None:
    assert f1_score(prediction, [*answers, other]) >= f1_score(prediction, answers)
    assert exact_match(prediction, [*answers, other]) >= exact_match(prediction, answers)


@pytest.mark.parametrize("answers", [[], "Rome"])
def test_scores_refuse_no_answers_and_a_bare_string(answers: list[str]) -> None:
    with pytest.raises(ValueError, match="answers must be a sequence of at least one"):
        f1_score("Rome", answers)


def test_normalized_f1_is_the_share_of_the_gap() -> None:
    assert normalized_f1(71.5, 36.8, 88.0) == pytest.approx(34.7 / 51.2)
    assert normalized_f1(36.8, 36.8, 88.0) == 0
    assert normalized_f1(88.0, 36.8, 88.0) == 1


@pytest.mark.parametrize(("reuse", "full"), [(40.0, 40.4), (40.0, 40.0), (41.0, 40.0)])
def test_normalized_f1_is_none_without_a_gap(reuse: float, full: float) -> None:
    assert normalized_f1(40.2, reuse, full) is None
    assert normalized_f1(40.2, 40.0, 40.5) == pytest.approx(0.4)


def test_kl_as_worked_out_by_hand() -> None:
    half, quarter = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    assert kl_to_full(half, quarter) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), abs=1e-7)
    assert kl_to_full(quarter, half) == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5), abs=1e-7)


@given(LOGITS, st.floats(-20, 20), st.randoms(use_true_random=False))
def test_kl_is_zero_to_itself_shift_invariant_and_not_negative(values: list[float], shift: float, random) -> None:
    full = torch.tensor(values, dtype=torch.float64)
    other = torch.tensor(random.sample(values, len(values)), dtype=torch.float64)
    assert kl_to_full(full, full) == 0
    assert kl_to_full(full, full + shift) == pytest.approx(0, abs=1e-12)
    assert kl_to_full(full, other) >= 0


def test_kl_of_bf16_logits_is_that_of_their_exact_values() -> None:
    full, other = torch.randn(2, 5000, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert kl_to_full(full, other) == kl_to_full(full.double(), other.double())


def test_kl_of_masked_tokens_is_exact() -> None:
    masked = torch.tensor([0.0, 0.0, -torch.inf])
    assert kl_to_full(masked, torch.zeros(3)) == pytest.approx(math.log(1.5))
    assert kl_to_full(masked, masked) == 0
    assert kl_to_full(torch.zeros(3), masked) == math.inf


@pytest.mark.parametrize(
    ("full", "other", "complaint"),
    [
        (torch.zeros(3), torch.zeros(4), r"\[V\], got \[3\] and \[4\]"),
        (torch.zeros(1, 3), torch.zeros(1, 3), r"\[V\], got \[1, 3\]"),
        (torch.tensor([0.0, torch.nan]), torch.zeros(2), "no distribution"),
        (torch.zeros(2), torch.full((2,), -torch.inf), "no distribution"),
    ],
)
def test_kl_refuses_what_is_not_two_distributions(full: torch.Tensor, other: torch.Tensor, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        kl_to_full(full, other)


@given(VALUES)
@settings(max_examples=40, deadline=None)
def test_bootstrap_interval_contains_the_mean_and_stays_within_the_values(values: list[float]) -> None:
    interval = bootstrap_mean(values)
    slack = 1e-9 * (1 + max(map(abs, values)))
    assert interval.mean == pytest.approx(math.fsum(values) / len(values), abs=slack)
    assert min(values) - slack <= interval.low <= interval.mean + slack
    assert interval.mean - slack <= interval.high <= max(values) + slack


@given(VALUES)
@settings(max_examples=20, deadline=None)
def test_paired_difference_of_identical_inputs_is_zero_with_interval_zero(values: list[float]) -> None:
    assert paired_bootstrap(values, values) == Interval(0, 0, 0)


@given(st.lists(st.tuples(st.floats(-10, 10), st.floats(-10, 10)), min_size=1, max_size=20))
@settings(max_examples=20, deadline=None)
def test_paired_difference_is_antisymmetric(pairs: list[tuple[float, float]]) -> None:
    a, b = zip(*pairs, strict=True)
    there, back = paired_bootstrap(a, b), paired_bootstrap(b, a)
    assert (back.mean, back.low, back.high) == pytest.approx((-there.mean, -there.high, -there.low), abs=1e-9)


def test_bootstrap_interval_has_the_width_of_the_normal_approximation() -> None:
    values = np.random.default_rng(5).normal(3.0, 2.0, size=400)
    interval = bootstrap_mean(values, num_draws=8000)
    error = values.std(ddof=1) / math.sqrt(400)
    assert interval.low == pytest.approx(interval.mean - 1.96 * error, abs=0.1 * error)
    assert interval.high == pytest.approx(interval.mean + 1.96 * error, abs=0.1 * error)


def test_pairing_removes_what_both_share() -> None:
    """Questions differ by hundreds, the two methods by exactly one: only the pairing can see it."""
    b = np.random.default_rng(1).normal(0, 100, size=50)
    difference = paired_bootstrap(b + 1, b)
    assert (difference.mean, difference.low, difference.high) == pytest.approx((1, 1, 1))


def test_bootstrap_repeats_under_a_seed_and_moves_with_it() -> None:
    values = [0.0, 1.0, 0.5, 0.25, 0.0, 1.0, 0.1]
    assert bootstrap_mean(values, seed=3) == bootstrap_mean(values, seed=3)
    assert bootstrap_mean(values, num_draws=50, seed=3) != bootstrap_mean(values, num_draws=50, seed=4)


@pytest.mark.parametrize(
    ("a", "b", "num_draws", "complaint"),
    [
        ([1.0, 2.0], [1.0], 10, "same questions"),
        ([], [], 10, "n >= 1"),
        ([1.0, math.nan], [1.0, 1.0], 10, "value 1 is not"),
        ([1.0], [1.0], 0, "num_draws"),
    ],
)
def test_bootstrap_refuses_what_it_cannot_resample(a, b, num_draws: int, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        paired_bootstrap(a, b, num_draws)


def test_the_interval_of_a_ratio_of_means_is_that_of_its_questions() -> None:
    full = [1.0, 0.5, 0.0, 1.0]
    assert bootstrap_ratio([0.5, 0.25, 0.0, 0.5], full).mean == 0.5
    found = bootstrap_ratio([1.0, 0.0, 0.0, 1.0], full)
    assert found.low < found.mean == 0.8 < found.high
    assert bootstrap_ratio([0.0], [0.0]) == Interval(1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="same questions"):
        bootstrap_ratio([1.0], full)
