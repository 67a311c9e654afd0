"""`fusionrag evaluate`: quality of every method against full prefill, on the same questions, chunks and prompt;
`fusionrag evaluate compare`: two runs, question by question; `fusionrag evaluate tune`: the smallest ratio that keeps a
quality; `fusionrag evaluate retrieval`: which passages the search modes find.

Methods: full, reuse, random, epic, cacheblend, fusionrag, attention, default. Knobs of the reuse configuration can be
set per method, e.g. `attention:probe_layers=all` or `attention:probe_layers=late+correction=1`. A killed run goes on
where it stopped when `--records` names a file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from fusionrag.config import ModelConfig, ReuseConfig
from fusionrag.errors import ConfigError
from scripts.commands import evaluate_compare, evaluate_retrieval, evaluate_tune
from scripts.commands.evaluate_compare import parse_configuration
from scripts.commands.evaluate_grid import add_run_arguments, answer, numbers, record_log, words
from scripts.evaluation.datasets import HALVES, Example, hop_order, load_dataset
from scripts.evaluation.records import Record, f1_by_group, f1_by_type, summarise
from scripts.evaluation.report import format_differences, format_groups, format_rows, paired_differences, plot_quality
from scripts.evaluation.runner import configurations, parse_method
from scripts.options import build

OTHERS = {
    "compare": (evaluate_compare, "what changed between two runs, question by question"),
    "tune": (evaluate_tune, "the smallest recompute ratio that keeps a quality, on your own questions"),
    "retrieval": (evaluate_retrieval, "which passages each search mode finds, instead of which answers are given"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = __doc__
    others = parser.add_subparsers(dest="measure", metavar="|".join(OTHERS))
    for name, (module, summary) in OTHERS.items():
        module.add_arguments(others.add_parser(name, help=summary, description=module.__doc__))
    parser.add_argument("--methods", default="full,reuse,default", help="comma-separated (default: %(default)s)")
    parser.add_argument("--ratios", default="0.15", help="comma-separated recompute ratios (default: %(default)s)")
    parser.add_argument(
        "--num-related", dest="num_related_list", default="0", help="comma-separated (default: %(default)s)"
    )
    parser.add_argument(
        "--half", choices=HALVES, help="every other question: settings are chosen on one half, reported on the other"
    )
    parser.add_argument(
        "--baseline", help="configuration to compare with, as method@ratio@num_related, e.g. fusionrag@0.15@0"
    )
    parser.add_argument("--plot", type=Path, help="write a PNG of quality against ratio and TTFT here")
    add_run_arguments(parser)


def run(args: argparse.Namespace) -> int:
    if args.measure != "compare" and args.dataset is None:
        raise ConfigError("dataset", "name the file of questions: --dataset FILE")
    if args.measure:
        return int(OTHERS[args.measure][0].run(args))
    base = build(ReuseConfig, args)
    grid = configurations(
        words(args.methods),
        numbers("ratios", args.ratios),
        [int(n) for n in numbers("num_related", args.num_related_list)],
        base,
    )
    for c in grid:  # a misspelt method fails here, not after an hour
        parse_method(c.method, base)
    examples = load_dataset(args.dataset, args.limit, half=args.half)
    with record_log(args.records) as log:
        answer(args, examples, grid, base, log)
        wanted = {e.example_id for e in examples}
        records = [r for r in log.records if r.example_id in wanted]
    _report(args, examples, records)
    return 0


def _report(args: argparse.Namespace, examples: Sequence[Example], records: Sequence[Record]) -> None:
    rows = summarise(records)
    print(format_rows(rows))
    print("\nF1 by type\n" + format_groups(f1_by_type(records)))
    orders = {e.example_id: hop_order(e) for e in examples}
    if any(orders.values()):
        print("\nF1 by hop order (bridge passage before or after the answer passage)")
        print(format_groups(f1_by_group(records, orders)))
    if args.baseline:
        baseline = parse_configuration("baseline", args.baseline)
        print("\n" + format_differences(paired_differences(records, baseline), baseline))
    if args.plot:
        plot_quality(rows, args.plot)
        print(f"plot: {args.plot}", file=sys.stderr)
    if args.json:
        from fusionrag.model import load_model
        from scripts.assembly import result

        found = result("evaluate", load_model(build(ModelConfig, args)), args, [asdict(row) for row in rows])
        args.json.write_text(json.dumps(found, indent=1) + "\n")
