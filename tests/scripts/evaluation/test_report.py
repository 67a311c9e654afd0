"""Tables align and show what the rows say; differences are paired; the figure is a PNG of every configuration."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from scripts.evaluation.errors import RecordError
from scripts.evaluation.metrics import Interval
from scripts.evaluation.records import Configuration, Record, Row, f1_by_type, summarise
from scripts.evaluation.report import (
    against_all,
    compare,
    format_comparisons,
    format_differences,
    format_groups,
    format_rows,
    paired_differences,
    plot_quality,
)

REUSE, ATTENTION = Configuration("reuse", 0.0, 0), Configuration("attention", 0.15, 5)


def record(configuration: Configuration, example_id: str, f1: float, nll: float = 1.0) -> Record:
    c = configuration
    return Record(
        example_id, "bridge", c.method, c.recompute_ratio, c.num_related, "p", f1, 0, nll, 0.5, 1, 9, 1320, 7.25
    )


def small_run() -> list[Record]:
    questions = [f"q{i}" for i in range(12)]
    random.seed(3)
    base = {question: random.random() / 2 for question in questions}
    return [
        *(record(REUSE, question, f1) for question, f1 in base.items()),
        *(record(ATTENTION, question, f1 + 0.25, nll=0.5) for question, f1 in base.items()),
    ]


def test_rows_form_aligned_columns_with_numbers_to_the_right() -> None:
    row = Row("attention", 0.15, 5, 71.49, 60.0, 0.1234, 0.8, 0.875, 0.678, 198.4, 1320.0, 12.34, 280)
    text = format_rows([row, replace(row, method="x", recompute_ratio=0.0, normalized_f1=None, f1=5.0)])
    header, first, second = text.split("\n")
    assert first.split() == [
        "attention",
        "0.15",
        "5",
        "71.5",
        "60.0",
        "0.123",
        "0.800",
        "0.88",
        "0.68",
        "198",
        "1320",
        "12.3",
        "280",
    ]
    assert second.split()[:4] == ["x", "0", "5", "5.0"] and second.split()[8] == "-"
    assert len(header.split()) == len(first.split()) == 13
    assert len({len(line) for line in (header, first, second)}) == 1
    assert max(map(len, (header, first, second))) <= 120
    ends = [[match.end() for match in re.finditer(r"\S+", line)][1:] for line in (header, first, second)]
    assert ends[0] == ends[1] == ends[2]


def test_differences_are_paired_over_common_questions() -> None:
    extra = record(ATTENTION, "only here", 1.0)
    (difference,) = paired_differences([*small_run(), extra], REUSE)
    assert (difference.configuration, difference.n) == (ATTENTION, 12)
    assert (difference.f1.mean, difference.f1.low, difference.f1.high) == pytest.approx((25.0, 25.0, 25.0))
    assert difference.answer_nll == Interval(-0.5, -0.5, -0.5)
    assert difference.kl_to_full == Interval(0, 0, 0)


def test_same_answers_and_the_largest_difference_in_kl_are_told() -> None:
    """What says whether two runs, on two devices perhaps, agree."""
    run = small_run()
    other = [replace(run[0], prediction="other", kl_to_full=0.75), *run[1:12]]
    found = compare(run[:12], other)
    assert found is not None and (found.difference.num_same, found.difference.max_kl) == (11, 0.25)
    assert "2.5e-01    11  12" in format_comparisons([found])


def test_a_method_meets_full_prefill_and_every_rival_at_its_own_ratios() -> None:
    ours = [Configuration("default", ratio, 3) for ratio in (0.1, 0.05)]
    rivals = [Configuration("epic", ratio, 0) for ratio in (0.05, 0.1, 0.3)]
    everything = [Configuration("full", 1.0, 0), REUSE, *ours, *rivals]
    run = [record(c, question, 0.5) for c in everything for question in ("p", "q")]
    pairs = [(c.a, c.b) for c in against_all(run, run, "default")]
    assert pairs == [
        (ours[1], everything[0]),
        (ours[1], rivals[0]),
        (ours[0], everything[0]),
        (ours[0], rivals[1]),
    ]
    with pytest.raises(RecordError, match="'attention' was not run; run are full, reuse, default, epic"):
        against_all(run, run, "attention")


def test_differences_do_not_depend_on_the_order_of_questions() -> None:
    """Pairs are matched by example_id, not by place in the file."""
    run = small_run()
    (shuffled,) = paired_differences(reversed(run), ATTENTION)
    assert (shuffled.f1.mean, shuffled.f1.low, shuffled.f1.high) == pytest.approx((-25.0, -25.0, -25.0))


def test_differences_leave_out_configurations_without_a_common_question() -> None:
    assert paired_differences([record(REUSE, "a", 0.5), record(ATTENTION, "b", 0.5)], REUSE) == []


def test_a_baseline_that_was_not_run_is_named_with_those_that_were() -> None:
    with pytest.raises(
        RecordError, match=r"full \(ratio 1, 0 related\) was not run; run are reuse \(ratio 0, 0 related\)"
    ):
        paired_differences(small_run(), Configuration("full", 1.0, 0))


def test_difference_table_shows_mean_and_interval() -> None:
    text = format_differences(paired_differences(small_run(), REUSE), REUSE)
    assert text.startswith("difference to reuse (ratio 0, 0 related) [95 % interval]\n")
    assert "+25.0 [+25.0, +25.0]" in text and "-0.500 [-0.500, -0.500]" in text


def test_group_table_has_a_column_per_group_and_a_dash_where_nothing_was_run() -> None:
    run = [*small_run(), replace(record(REUSE, "s", 1.0), type="single_year")]
    header, reuse, attention = format_groups(f1_by_type(run)).split("\n")
    assert header.split() == ["method", "ratio", "related", "bridge", "single"]
    assert reuse.endswith("100.0 (1)") and "(12)" in reuse
    assert attention.split()[-1] == "-"


def test_tables_of_nothing_are_their_headers() -> None:
    assert format_rows([]).startswith("method")
    assert format_groups([]).split() == ["method", "ratio", "related"]
    assert len(format_differences([], REUSE).split("\n")) == 2


def test_quality_figure_is_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    curve = [record(Configuration("attention", ratio, 5), "q", ratio) for ratio in (0.3, 0.05, 0.15)]
    plot_quality(summarise([*small_run(), *(replace(r, example_id="p") for r in curve)]), tmp_path / "quality")
    assert (tmp_path / "quality").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_tables_work_and_the_figure_names_what_is_missing_without_matplotlib() -> None:
    program = """
import sys
sys.modules["matplotlib"] = None  # how the interpreter itself marks a module that cannot be imported
from scripts.evaluation.errors import EvaluationError
from scripts.evaluation.report import format_rows, plot_quality
assert format_rows([])
try:
    plot_quality([], "unused.png")
except EvaluationError as error:
    assert isinstance(error, ImportError)
    sys.exit(0 if "matplotlib; install it" in str(error) else f"unclear: {error}")
sys.exit("nothing was raised")
"""
    root = Path(__file__).resolve().parents[3]
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, timeout=60, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_evaluation_imports_neither_torch_nor_the_server_nor_the_engine() -> None:
    """It runs on a machine that has only numpy, and fast: torch comes in with the first logits."""
    program = """
import sys
import scripts.evaluation.datasets, scripts.evaluation.report
heavy = {"torch", "transformers", "matplotlib", "fastapi", "faiss", "typer", "fusionrag", "server"} & set(sys.modules)
sys.exit(f"imported: {sorted(heavy)}" if heavy else 0)
"""
    root = Path(__file__).resolve().parents[3]
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, timeout=60, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
