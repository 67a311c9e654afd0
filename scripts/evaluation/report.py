"""What a person reads of an evaluation: tables for a terminal, paired differences, the figure of quality by ratio.

Knows only records and their rows. matplotlib is imported when a figure is drawn, never before.
Invariant: a difference is taken over the questions that both configurations answered, and says how many they are.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts.evaluation.errors import PlotError, RecordError
from scripts.evaluation.metrics import Interval, paired_bootstrap
from scripts.evaluation.records import Configuration, GroupRow, Record, Row, by_configuration

_KNOBS = ("method", "ratio", "related")
_DIFFERENCES = ("F1", "NLL", "KL", "max |KL|", "same", "n")
_RATIO, _TTFT = "recomputed share of the reused tokens (%)", "time to first token (ms, median)"
_F1, _KL = "F1 (percent points)", "KL to full prefill (nats)"
_PANELS = (
    ("recompute_ratio", _RATIO, "f1", _F1),
    ("recompute_ratio", _RATIO, "kl_to_full", _KL),
    ("ttft_ms_p50", _TTFT, "f1", _F1),
)


@dataclass(frozen=True)
class Difference:
    """Configuration minus baseline over their `n` common questions: F1 in percent points, the others in nats.

    num_same: questions with the same answer, letter by letter; max_kl: the largest difference of one question.
    """

    configuration: Configuration
    f1: Interval
    answer_nll: Interval
    kl_to_full: Interval
    num_same: int
    max_kl: float
    n: int


@dataclass(frozen=True)
class Comparison:
    """Two configurations, perhaps of two runs, over their common questions: `a` minus `b`."""

    a: Configuration
    b: Configuration
    difference: Difference


def compare(a: Sequence[Record], b: Sequence[Record]) -> Comparison | None:
    """Records of one configuration each; None without a common question."""
    base = {record.example_id: record for record in b}
    pairs = [(record, base[record.example_id]) for record in a if record.example_id in base]
    if not pairs:
        return None
    return Comparison(a[0].configuration, b[0].configuration, _difference(a[0].configuration, pairs))


def against_all(a: Iterable[Record], b: Iterable[Record], method: str) -> list[Comparison]:
    """`method`, as `a` has it, against full prefill and every other configuration of `b` at the same ratio.

    Raises RecordError if `a` does not hold the method.
    """
    ours, others = by_configuration(a), by_configuration(b)
    found = []
    for left in sorted((c for c in ours if c.method == method), key=lambda c: c.recompute_ratio):
        rivals = [c for c in others if c != left and (c.recompute_ratio == left.recompute_ratio or c.method == "full")]
        found += [compare(ours[left], others[c]) for c in rivals]
    if not any(c.method == method for c in ours):
        raise RecordError(f"method {method!r} was not run; run are {', '.join(dict.fromkeys(c.method for c in ours))}")
    return [comparison for comparison in found if comparison is not None]


def format_comparisons(comparisons: Sequence[Comparison]) -> str:
    """Each comparison as a line of an aligned table: both configurations, then the differences with intervals."""
    cells = [[_label(c.a), _label(c.b), *_difference_cells(c.difference)] for c in comparisons]
    return "A minus B [95 % interval]\n" + table(["A", "B", *_DIFFERENCES], cells)


def paired_differences(records: Iterable[Record], baseline: Configuration) -> list[Difference]:
    """Every other configuration against `baseline`, with 95 % intervals; those without a common question are left out.

    Raises RecordError if `baseline` was not run.
    """
    groups = by_configuration(records)
    if baseline not in groups:
        raise RecordError(f"baseline: {_label(baseline)} was not run; run are {'; '.join(map(_label, groups))}")
    base = groups.pop(baseline)
    comparisons = [compare(group, base) for group in groups.values()]
    return [comparison.difference for comparison in comparisons if comparison is not None]


def format_rows(rows: Sequence[Row]) -> str:
    """The rows as an aligned table: F1 and EM in percent points, NLL and KL in nats, top-1 a share in [0, 1]."""
    header = [*_KNOBS, "F1", "EM", "NLL", "KL", "top-1", "norm.F1", "recomputed", "prompt", "TTFT_ms", "n"]
    return table(header, [_row_cells(row) for row in rows])


def format_differences(differences: Sequence[Difference], baseline: Configuration) -> str:
    """The differences as an aligned table under a line that names the baseline."""
    header = [*_KNOBS, *_DIFFERENCES]
    cells = [[*_knobs(d.configuration), *_difference_cells(d)] for d in differences]
    return f"difference to {_label(baseline)} [95 % interval]\n{table(header, cells)}"


def format_groups(rows: Sequence[GroupRow]) -> str:
    """F1 in percent points, a line per configuration and a column per group, number of questions in brackets."""
    groups = sorted({row.group for row in rows})
    values = {(row.configuration, row.group): f"{row.f1:.1f} ({row.n})" for row in rows}
    cells = [
        [*_knobs(configuration), *(values.get((configuration, group), "-") for group in groups)]
        for configuration in dict.fromkeys(row.configuration for row in rows)
    ]
    return table([*_KNOBS, *groups], cells)


def plot_quality(rows: Sequence[Row], path: str | Path) -> None:
    """Writes a PNG: F1, and KL to full prefill, against the ratio; F1 against TTFT. A line a method and num_related.

    Against the ratio, `full` and `reuse` are horizontal lines; ratio 1 of other methods, which is `full`, is left out.
    Raises PlotError without matplotlib.
    """
    try:
        matplotlib = importlib.import_module("matplotlib.figure")  # not pyplot: no display, no global state
    except ImportError as error:
        raise PlotError("plot_quality needs matplotlib; install it, or leave the figure out") from error

    figure = matplotlib.Figure(figsize=(15, 4.5), layout="constrained")
    axes = figure.subplots(1, len(_PANELS))
    series: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        if row.recompute_ratio == 1 and row.method != "full":
            continue
        series.setdefault((row.method, row.num_related), []).append(row)
    for axis, (across, across_title, up, up_title) in zip(axes, _PANELS, strict=True):
        for place, ((method, num_related), members) in enumerate(series.items()):
            label, color = f"{method}, {num_related} related", f"C{place}"
            if across == "recompute_ratio" and method in ("full", "reuse"):
                axis.axhline(getattr(members[0], up), label=label, color=color, linestyle="--", linewidth=1)
            else:
                scale = 100 if across == "recompute_ratio" else 1
                ordered = sorted(members, key=lambda row: row.recompute_ratio)
                points = [(scale * getattr(row, across), getattr(row, up)) for row in ordered]
                axis.plot(*zip(*points, strict=True), label=label, color=color, marker="o", markersize=4)
        axis.set_xlabel(across_title)
        axis.set_ylabel(up_title)
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, format="png", dpi=130)


def _difference(configuration: Configuration, pairs: list[tuple[Record, Record]]) -> Difference:
    def interval(field: str, scale: float) -> Interval:
        ours, theirs = ([scale * getattr(pair[side], field) for pair in pairs] for side in (0, 1))
        return paired_bootstrap(ours, theirs)

    num_same = sum(ours.prediction == theirs.prediction for ours, theirs in pairs)
    max_kl = max(abs(ours.kl_to_full - theirs.kl_to_full) for ours, theirs in pairs)
    intervals = interval("f1", 100), interval("answer_nll", 1), interval("kl_to_full", 1)
    return Difference(configuration, *intervals, num_same, max_kl, len(pairs))


def _difference_cells(difference: Difference) -> list[str]:
    d = difference
    intervals = [_interval(d.f1, 1), _interval(d.answer_nll, 3), _interval(d.kl_to_full, 3)]
    return [*intervals, f"{d.max_kl:.1e}", str(d.num_same), str(d.n)]


def _row_cells(row: Row) -> list[str]:
    return [
        *_knobs(Configuration(row.method, row.recompute_ratio, row.num_related)),
        f"{row.f1:.1f}",
        f"{row.em:.1f}",
        f"{row.answer_nll:.3f}",
        f"{row.kl_to_full:.3f}",
        f"{row.top1_agreement:.2f}",
        "-" if row.normalized_f1 is None else f"{row.normalized_f1:.2f}",
        f"{row.recomputed_tokens:.0f}",
        f"{row.prompt_tokens:.0f}",
        "-" if math.isnan(row.ttft_ms_p50) else f"{row.ttft_ms_p50:.1f}",
        str(row.n),
    ]


def _knobs(configuration: Configuration) -> list[str]:
    return [configuration.method, f"{configuration.recompute_ratio:g}", str(configuration.num_related)]


def _label(configuration: Configuration) -> str:
    method, ratio, related = _knobs(configuration)
    return f"{method} (ratio {ratio}, {related} related)"


def _interval(interval: Interval, digits: int) -> str:
    return f"{interval.mean:+.{digits}f} [{interval.low:+.{digits}f}, {interval.high:+.{digits}f}]"


def table(header: list[str], rows: list[list[str]]) -> str:
    """Columns as wide as their widest cell: the first to the left, the others, numbers, to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in [header, *rows]]
    for line, row in zip(lines, [header, *rows], strict=True):
        line[0] = row[0].ljust(widths[0])
    return "\n".join("  ".join(line).rstrip() for line in lines)
