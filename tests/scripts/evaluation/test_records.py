"""A run's record survives kills, refuses what would spoil a comparison, and adds up as worked out by hand."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts.evaluation.errors import RecordError
from scripts.evaluation.records import (
    Configuration,
    Record,
    RecordLog,
    f1_by_group,
    f1_by_type,
    read_records,
    summarise,
)

BASE = Record(
    example_id="q0",
    type="bridge_director_birth",
    method="attention",
    recompute_ratio=0.15,
    num_related=5,
    prediction="3 May 1921",
    f1=0.5,
    em=0.0,
    answer_nll=1.25,
    kl_to_full=0.5,
    top1_agreement=1.0,
    recomputed_tokens=150,
    prompt_tokens=1100,
    ttft_ms=20.0,
)

shares = st.floats(0, 1)
counts = st.integers(0, 10**6)
amounts = st.floats(0, 1e6)
records = st.builds(
    Record,
    recompute_ratio=shares,
    num_related=counts,
    f1=shares,
    em=shares,
    answer_nll=amounts,
    kl_to_full=amounts,
    top1_agreement=shares,
    recomputed_tokens=counts,
    prompt_tokens=counts,
    ttft_ms=amounts,
)  # the other fields are any text


def run_of(method: str, f1: list[float], ratio: float = 0.0, num_related: int = 0) -> list[Record]:
    """One record per value of `f1`, of questions q0, q1, …"""
    knobs = {"method": method, "recompute_ratio": ratio, "num_related": num_related}
    return [replace(BASE, example_id=f"q{i}", f1=value, **knobs) for i, value in enumerate(f1)]


@given(record=records)
@settings(max_examples=25, deadline=None)  # each waits for the disk
def test_a_record_reads_back_as_it_was_written(tmp_path_factory: pytest.TempPathFactory, record: Record) -> None:
    path = tmp_path_factory.mktemp("log") / "run.jsonl"
    RecordLog(path).append(record)
    assert read_records(path) == [record]
    assert path.read_bytes().count(b"\n") == 1


def test_a_log_opened_again_knows_what_need_not_be_run(tmp_path: Path) -> None:
    first = RecordLog(tmp_path / "run.jsonl")
    first.append(BASE)
    again = RecordLog(tmp_path / "run.jsonl")
    assert BASE.key in again
    assert ("q0", Configuration("attention", 0.15, 0)) not in again
    assert ("q1", BASE.configuration) not in again
    again.append(replace(BASE, example_id="q1"))
    assert [record.example_id for record in again.records] == ["q0", "q1"]
    assert read_records(tmp_path / "run.jsonl") == list(again.records)


def test_ratio_zero_is_one_key_as_integer_and_as_float(tmp_path: Path) -> None:
    RecordLog(tmp_path / "run.jsonl").append(replace(BASE, recompute_ratio=0))
    assert ("q0", Configuration("attention", 0.0, 5)) in RecordLog(tmp_path / "run.jsonl")


def test_a_log_cut_at_any_byte_keeps_its_whole_lines_and_goes_on(tmp_path: Path) -> None:
    path, written = tmp_path / "run.jsonl", [BASE, replace(BASE, example_id="q1")]
    log = RecordLog(path)
    for record in written:
        log.append(record)
    content = path.read_bytes()
    for size in [*range(0, len(content), 29), len(content) // 2 - 1, len(content) // 2, len(content) - 1]:
        path.write_bytes(content[:size])
        num_whole = content[:size].count(b"\n")
        assert read_records(path) == written[:num_whole]
        resumed = RecordLog(path)
        for record in written[num_whole:]:
            resumed.append(record)
        assert path.read_bytes() == content


def test_records_survive_a_kill_of_the_process_that_wrote_them(tmp_path: Path) -> None:
    program = """
import os, signal, sys
from dataclasses import replace
from scripts.evaluation.records import Record, RecordLog
log = RecordLog(sys.argv[1])
base = Record("", "t", "full", 1.0, 0, "p", 1.0, 1.0, 0.0, 0.0, 1.0, 9, 10, 1.0)
for i in range(3):
    log.append(replace(base, example_id=f"q{i}"))
os.kill(os.getpid(), signal.SIGKILL)
"""
    root = Path(__file__).resolve().parents[3]
    environment = os.environ | {"PYTHONPATH": str(root)}
    command = [sys.executable, "-c", program, str(tmp_path / "run.jsonl")]
    assert subprocess.run(command, env=environment, timeout=60).returncode == -signal.SIGKILL
    assert [record.example_id for record in read_records(tmp_path / "run.jsonl")] == ["q0", "q1", "q2"]


def test_a_key_is_recorded_once(tmp_path: Path) -> None:
    log = RecordLog(tmp_path / "run.jsonl")
    log.append(BASE)
    with pytest.raises(RecordError, match=r"'q0' with attention, ratio 0\.15, 5 related is already recorded"):
        log.append(replace(BASE, f1=1.0))
    assert read_records(tmp_path / "run.jsonl") == [BASE]


def test_a_second_run_on_the_same_file_is_stopped_before_it_mixes_lines(tmp_path: Path) -> None:
    one, other = RecordLog(tmp_path / "run.jsonl"), RecordLog(tmp_path / "run.jsonl")
    one.append(BASE)
    with pytest.raises(RecordError, match="was changed during this run"):
        other.append(replace(BASE, example_id="q1"))
    assert read_records(tmp_path / "run.jsonl") == [BASE]


def test_a_file_of_something_else_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "notes.json"
    path.write_text('{"precious": true}')
    with pytest.raises(RecordError, match=r"notes\.json: line 1: is no record of an evaluation; name another file"):
        RecordLog(path)
    assert path.read_text() == '{"precious": true}'


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"f1": "0.5"}, "f1: must be of type float, got '0.5'"),
        ({"num_related": 2.5}, "num_related: must be of type int, got 2.5"),
        ({"ttft_ms": None}, "ttft_ms: must be of type float, got None"),
        ({"em": 50.0}, r"em: must lie in \[0, 1\], got 50.0"),
        ({"kl_to_full": math.nan}, "kl_to_full: must be finite and not negative, got nan"),
        ({"surprise": 1}, "unexpected keyword argument 'surprise'"),
    ],
)
def test_a_bad_line_is_named_by_file_line_and_field(tmp_path: Path, change: dict[str, object], complaint: str) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(f"{json.dumps(asdict(BASE))}\n{json.dumps(asdict(BASE) | change)}\n")
    with pytest.raises(RecordError, match=rf"run\.jsonl: line 2: .*{complaint}"):
        read_records(path)


@pytest.mark.parametrize("line", ["{broken", "[1]", "7"])
def test_a_line_that_is_no_object_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "run.jsonl").write_text(line + "\n")
    with pytest.raises(RecordError, match="line 1: "):
        read_records(tmp_path / "run.jsonl")


def test_a_line_that_stands_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.jsonl").write_text(f"{json.dumps(asdict(BASE))}\n" * 2)
    with pytest.raises(RecordError, match=r"line 2: example 'q0' .* is recorded twice"):
        read_records(tmp_path / "run.jsonl")


@pytest.mark.parametrize("field", ["answer_nll", "kl_to_full", "ttft_ms"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_a_figure_that_is_no_measurement_is_never_recorded(field: str, value: float) -> None:
    with pytest.raises(RecordError, match=field):
        replace(BASE, **{field: value})


def test_rows_are_means_in_percent_points_and_a_median_time() -> None:
    (row,) = summarise(
        [
            replace(BASE, example_id="a", f1=0.2, em=0.0, answer_nll=1.0, kl_to_full=0.0, ttft_ms=10.0),
            replace(BASE, example_id="b", f1=0.4, em=0.0, answer_nll=2.0, kl_to_full=0.3, ttft_ms=500.0),
            replace(
                BASE, example_id="c", f1=0.9, em=1.0, answer_nll=6.0, top1_agreement=0.0, kl_to_full=0.9, ttft_ms=30.0
            ),
        ]
    )
    assert (row.method, row.recompute_ratio, row.num_related, row.n) == ("attention", 0.15, 5, 3)
    assert (row.f1, row.em) == pytest.approx((50.0, 100 / 3))
    assert (row.answer_nll, row.kl_to_full, row.top1_agreement) == pytest.approx((3.0, 0.4, 2 / 3))
    assert (row.recomputed_tokens, row.prompt_tokens, row.ttft_ms_p50) == (150, 1100, 30.0)
    assert row.normalized_f1 is None


def test_rows_have_the_fields_of_the_evaluate_command_in_its_order() -> None:
    names = """method recompute_ratio num_related f1 em answer_nll kl_to_full top1_agreement normalized_f1
               recomputed_tokens prompt_tokens ttft_ms_p50 n"""
    assert " ".join(asdict(summarise([BASE])[0])) == " ".join(names.split())


def test_normalized_f1_runs_from_plain_reuse_to_full_prefill() -> None:
    rows = summarise(
        [
            *run_of("reuse", [0.5, 0.3], num_related=5),  # reuse of fused KV is a method, not the zero of the scale
            *run_of("reuse", [0.2, 0.2]),
            *run_of("full", [1.0, 0.8], ratio=1.0),
            *run_of("attention", [0.9, 0.2], ratio=0.15, num_related=5),
        ]
    )
    assert [row.normalized_f1 for row in rows] == pytest.approx([0.2 / 0.7, 0.0, 1.0, 0.35 / 0.7])


def test_normalized_f1_is_taken_on_the_rows_own_questions_or_not_at_all() -> None:
    """An interrupted run: comparing its first questions with the mean of all would be a comparison of questions."""
    whole = [*run_of("reuse", [0.0, 0.0, 0.0]), *run_of("full", [1.0, 0.0, 0.0], ratio=1.0)]
    (partial,) = [row for row in summarise([*whole, *run_of("epic", [0.5], ratio=0.15)]) if row.method == "epic"]
    assert partial.normalized_f1 == pytest.approx(0.5)
    (ahead,) = [row for row in summarise([*whole, *run_of("epic", [0.5] * 4, ratio=0.15)]) if row.method == "epic"]
    assert ahead.normalized_f1 is None


def test_summary_of_nothing_is_no_rows_and_a_doubled_key_is_refused() -> None:
    assert summarise([]) == []
    with pytest.raises(RecordError, match="recorded twice"):
        summarise([BASE, BASE])


def test_types_are_grouped_by_family() -> None:
    kinds = [
        "bridge_director_birth",
        "real_bridge",
        "comp_birth",
        "comparison",
        "single_year",
        "nq",
        "bridge_comparison",
        "",
    ]
    rows = f1_by_type(replace(BASE, example_id=str(i), type=kind, f1=i / 10) for i, kind in enumerate(kinds))
    assert [(row.group, row.n) for row in rows] == [
        ("bridge", 2), ("bridge_comparison", 1), ("comparison", 2), ("nq", 1), ("single", 1), ("untyped", 1)
    ]  # fmt: skip
    assert [row.f1 for row in rows] == pytest.approx([5.0, 60.0, 25.0, 50.0, 40.0, 70.0])


def test_questions_without_a_group_are_left_out() -> None:
    orders = {"q0": "before", "q1": "after", "q2": None, "q4": "before"}
    rows = f1_by_group([*run_of("full", [1.0, 0.5, 0.3, 0.2, 0.0], ratio=1.0)], orders)
    assert [(row.group, row.f1, row.n) for row in rows] == [("after", 50.0, 1), ("before", 50.0, 2)]
    assert {row.configuration for row in rows} == {Configuration("full", 1.0, 0)}
