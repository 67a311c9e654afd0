"""`fusionrag evaluate report FILES`: tables and figure from records alone; no model is loaded and nothing is run.

FILES are `--records` of one dataset, of one run or of several; where two hold the same question and configuration, the
first one's counts. `--dataset` adds the table by hop order. `--ttft-from` takes the times from records of another run,
one that had the machine to itself, while several workers shared it for the answers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from math import nan
from pathlib import Path

from scripts.commands.evaluate_compare import parse_configuration
from scripts.evaluation.datasets import Example, hop_order, load_dataset
from scripts.evaluation.records import Record, Row, f1_by_group, f1_by_type, merged, summarise
from scripts.evaluation.report import format_differences, format_groups, format_rows, paired_differences, plot_quality


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", metavar="FILES", nargs="+", type=Path, help="JSONL files of --records")
    parser.add_argument("--dataset", type=Path, help="the file of questions")
    parser.add_argument("--ttft-from", type=Path, help="records whose times to first token are shown instead")
    add_report_arguments(parser)


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that a run's own report has as well."""
    parser.add_argument(
        "--baseline", help="configuration to compare with, as method@ratio@num_related, e.g. fusionrag@0.15@0"
    )
    parser.add_argument("--plot", type=Path, help="write a PNG of quality against ratio and TTFT here")


def run(args: argparse.Namespace) -> int:
    records = merged(args.files)
    rows = summarise(records)
    if args.ttft_from:
        rows = timed(rows, merged([args.ttft_from]))
    print_report(args, records, rows, load_dataset(args.dataset) if args.dataset else ())
    return 0


def timed(rows: Sequence[Row], records: Sequence[Record]) -> list[Row]:
    """The rows with the TTFT of these records; nan where they do not hold the configuration."""
    ttft = {(r.method, r.recompute_ratio, r.num_related): r.ttft_ms_p50 for r in summarise(records)}
    return [replace(r, ttft_ms_p50=ttft.get((r.method, r.recompute_ratio, r.num_related), nan)) for r in rows]


def print_report(
    args: argparse.Namespace, records: Sequence[Record], rows: Sequence[Row], examples: Sequence[Example]
) -> None:
    """examples: for the order of the hops; those of other questions do no harm."""
    print(format_rows(rows))
    print("\nF1 by type\n" + format_groups(f1_by_type(records)))
    orders = {e.example_id: hop_order(e) for e in examples}
    if any(orders.get(record.example_id) for record in records):
        print("\nF1 by hop order (bridge passage before or after the answer passage)")
        print(format_groups(f1_by_group(records, orders)))
    if args.baseline:
        baseline = parse_configuration("baseline", args.baseline)
        print("\n" + format_differences(paired_differences(records, baseline), baseline))
    if args.plot:
        plot_quality(rows, args.plot)
        print(f"plot: {args.plot}", file=sys.stderr)
