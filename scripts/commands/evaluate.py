"""`fusionrag evaluate`: quality of every method against full prefill, on the same questions, chunks and prompt.

    report      its tables and figure once more, from records
    compare     two runs, or one method and its rivals, question by question
    tune        the smallest ratio that keeps a quality
    retrieval   which passages the search modes find
    links       which passages that a question needs together are stored together

Methods: full, reuse, random, epic, cacheblend, cacheblend_gradual, prophetkv, fusionrag, attention, default. Knobs can
be set per method: of the request, `attention:probe_layers=late+correction=1`, and of the offline job that its KV comes
from, `fusionrag:num_related=5+related_by=meaning+fuse_behind=all`. `stale_share=0.1` is the quality when so many of the
passages have changed and the KV behind them was not refreshed. A killed run goes on where it stopped when `--records`
names a file. `--num-workers` processes take turns on all visible GPUs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict

from fusionrag.config import ModelConfig
from fusionrag.errors import ConfigError
from scripts.commands import evaluate_compare, evaluate_links, evaluate_report, evaluate_retrieval, evaluate_tune
from scripts.commands.evaluate_grid import add_run_arguments, answer, base_of, numbers, record_log, words
from scripts.commands.evaluate_report import add_report_arguments, print_report
from scripts.evaluation.datasets import HALVES, load_dataset
from scripts.evaluation.methods import configurations
from scripts.evaluation.records import Row, summarise
from scripts.options import build

OTHERS = {
    "compare": (evaluate_compare, "what changed between two runs, question by question"),
    "report": (evaluate_report, "tables and figure from the records of runs, without running anything"),
    "tune": (evaluate_tune, "the smallest recompute ratio that keeps a quality, on your own questions"),
    "retrieval": (evaluate_retrieval, "which passages each search mode finds, instead of which answers are given"),
    "links": (evaluate_links, "how often passages that are needed together are stored together; needs no model"),
}
FROM_RECORDS = ("compare", "report")


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
    add_report_arguments(parser)
    add_run_arguments(parser)


def run(args: argparse.Namespace) -> int:
    if args.measure not in FROM_RECORDS and args.dataset is None:
        raise ConfigError("dataset", "name the file of questions: --dataset FILE")
    if args.measure:
        return int(OTHERS[args.measure][0].run(args))
    base = base_of(args)
    grid = configurations(
        words(args.methods),
        numbers("ratios", args.ratios),
        [int(n) for n in numbers("num_related", args.num_related_list)],
        base,
    )
    examples = load_dataset(args.dataset, args.limit, half=args.half)
    with record_log(args.records) as log:
        answer(args, examples, grid, base, log)
        wanted = {e.example_id for e in examples}
        records = [r for r in log.records if r.example_id in wanted]
    rows = summarise(records)
    print_report(args, records, rows, examples)
    if args.json:
        _write_json(args, rows)
    return 0


def _write_json(args: argparse.Namespace, rows: Sequence[Row]) -> None:
    from fusionrag.model import load_model
    from scripts.assembly import result

    found = result("evaluate", load_model(build(ModelConfig, args)), args, [asdict(row) for row in rows])
    args.json.write_text(json.dumps(found, indent=1) + "\n")
