"""`fusionrag evaluate`: quality of every method against full prefill, on the same questions, chunks and prompt;
`fusionrag evaluate retrieval`: which passages the search modes find.

Methods: full, reuse, random, epic, cacheblend, fusionrag, attention, default. Knobs of the reuse configuration can be
set per method, e.g. `attention:probe_layers=all` or `attention:probe_layers=late+correction=1`. A killed run goes on
where it stopped when `--records` names a file.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from fusionrag.config import EngineConfig, ModelConfig, PreprocessConfig, PromptConfig, ReuseConfig
from fusionrag.errors import ConfigError
from index.config import EmbeddingConfig
from scripts.commands import evaluate_retrieval as retrieval
from scripts.evaluation.datasets import Example, Passage, hop_order, load_dataset
from scripts.evaluation.neighbours import related_passages
from scripts.evaluation.records import Configuration, Record, RecordLog, f1_by_group, f1_by_type, summarise
from scripts.evaluation.report import format_differences, format_groups, format_rows, paired_differences, plot_quality
from scripts.evaluation.runner import Setup, Task, configurations, parse_method
from scripts.evaluation.runner import run as run_tasks
from scripts.options import add_config_flags, build


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = __doc__
    others = parser.add_subparsers(dest="measure", metavar="retrieval")
    summary = "which passages each search mode finds, instead of which answers are given from them"
    retrieval.add_arguments(others.add_parser("retrieval", help=summary, description=retrieval.__doc__))
    parser.add_argument("--dataset", type=Path, help="CacheBlend, LongBench, HotpotQA, 2Wiki or SQuAD file")
    parser.add_argument("--methods", default="full,reuse,default", help="comma-separated (default: %(default)s)")
    parser.add_argument("--ratios", default="0.15", help="comma-separated recompute ratios (default: %(default)s)")
    parser.add_argument(
        "--num-related", dest="num_related_list", default="0", help="comma-separated (default: %(default)s)"
    )
    parser.add_argument("--limit", type=int, help="a sample of this many questions, the same for the same number")
    parser.add_argument(
        "--related-corpus", type=Path, help="JSON list of {title, text}: more passages to find related ones in"
    )
    parser.add_argument("--records", type=Path, help="JSONL file of all records; an interrupted run resumes from it")
    parser.add_argument(
        "--baseline", help="configuration to compare with, as method@ratio@num_related, e.g. fusionrag@0.15@0"
    )
    parser.add_argument(
        "--num-workers", type=int, default=1, help="processes that share the questions (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--plot", type=Path, help="write a PNG of quality against ratio here")
    parser.add_argument("--config", type=Path, help=argparse.SUPPRESS)
    add_config_flags(parser, ModelConfig, PromptConfig, EmbeddingConfig, ReuseConfig, EngineConfig)


def run(args: argparse.Namespace) -> int:
    if args.dataset is None:
        raise ConfigError("dataset", "name the file of questions: --dataset FILE")
    if args.measure == "retrieval":
        return retrieval.run(args)
    base = build(ReuseConfig, args)
    grid = configurations(
        _words(args.methods),
        _numbers("ratios", args.ratios),
        [int(n) for n in _numbers("num_related", args.num_related_list)],
        base,
    )
    for c in grid:  # a misspelt method fails here, not after an hour
        parse_method(c.method, base)
    examples = load_dataset(args.dataset, args.limit)
    with tempfile.TemporaryDirectory() as scratch:
        log = RecordLog(args.records or Path(scratch) / "records.jsonl")
        _answer(args, examples, grid, base, log)
        wanted = {e.example_id for e in examples}
        records = [r for r in log.records if r.example_id in wanted]
    _report(args, examples, records)
    return 0


def _answer(
    args: argparse.Namespace,
    examples: Sequence[Example],
    grid: tuple[Configuration, ...],
    base: ReuseConfig,
    log: RecordLog,
) -> None:
    todo = [e for e in examples if any((e.example_id, c) not in log for c in grid)]
    most = max(c.num_related for c in grid)
    extra = _read_corpus(args.related_corpus) if args.related_corpus else ()
    related = related_passages(examples, extra, most, PreprocessConfig().near_duplicate, build(EmbeddingConfig, args))
    threads = 1 if args.num_workers > 1 else 0
    setup = Setup(build(ModelConfig, args), build(PromptConfig, args), build(EngineConfig, args), base, threads)
    tasks = [Task(e, {p: related.get(p, ()) for p in e.passages}, grid) for e in todo]
    with tqdm(
        total=len(examples), initial=len(examples) - len(todo), unit="question", desc="evaluate", disable=None
    ) as bar:
        for records in run_tasks(setup, tasks, args.num_workers):
            for record in records:
                if record.key not in log:
                    log.append(record)
            bar.update()


def _report(args: argparse.Namespace, examples: Sequence[Example], records: Sequence[Record]) -> None:
    rows = summarise(records)
    print(format_rows(rows))
    print("\nF1 by type\n" + format_groups(f1_by_type(records)))
    orders = {e.example_id: hop_order(e) for e in examples}
    if any(orders.values()):
        print("\nF1 by hop order (bridge passage before or after the answer passage)")
        print(format_groups(f1_by_group(records, orders)))
    if args.baseline:
        baseline = _baseline(args.baseline)
        print("\n" + format_differences(paired_differences(records, baseline), baseline))
    if args.plot:
        plot_quality(rows, args.plot)
        print(f"plot: {args.plot}", file=sys.stderr)
    if args.json:
        from fusionrag.model import load_model
        from scripts.assembly import result

        found = result("evaluate", load_model(build(ModelConfig, args)), args, [asdict(row) for row in rows])
        args.json.write_text(json.dumps(found, indent=1) + "\n")


def _baseline(text: str) -> Configuration:
    try:
        method, ratio, num_related = text.rsplit("@", 2)
        return Configuration(method, float(ratio), int(num_related))
    except ValueError as error:
        raise ConfigError("baseline", f"must be method@ratio@num_related, got {text!r}") from error


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _numbers(name: str, text: str) -> list[float]:
    try:
        return [float(word) for word in _words(text)]
    except ValueError as error:
        raise ConfigError(name, f"must be comma-separated numbers, got {text!r}") from error


def _read_corpus(path: Path) -> tuple[Passage, ...]:
    try:
        return tuple(Passage(p.get("title", ""), p["text"]) for p in json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError("related_corpus", f"{path}: must be a JSON list of {{title, text}}: {error}") from error
