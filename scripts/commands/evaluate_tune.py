"""`fusionrag evaluate tune`: the smallest recompute ratio that keeps enough of full prefill's answers.

Enough is `--target`, a share of full prefill's F1 on your questions. The ratio is chosen on every other question and
reported, with its interval, on those between: what was chosen for some questions flatters itself on them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from fusionrag.errors import ConfigError
from scripts.commands.evaluate_grid import add_run_arguments, answer, base_of, numbers, record_log
from scripts.evaluation.datasets import Example, load_dataset
from scripts.evaluation.methods import FULL
from scripts.evaluation.metrics import Interval, bootstrap_ratio
from scripts.evaluation.records import Configuration, Record, RecordLog, by_configuration, summarise
from scripts.evaluation.report import format_rows
from scripts.options import build


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", type=float, default=0.95, help="share of full prefill's F1 (default: %(default)s)")
    parser.add_argument(
        "--ratios", default="0,0.02,0.05,0.1,0.15,0.2,0.3,0.5", help="comma-separated, tried (default: %(default)s)"
    )
    parser.add_argument("--num-related", dest="related_number", type=int, default=0, help="(default: %(default)s)")
    add_run_arguments(parser)


@dataclass(frozen=True)
class Tuned:
    """kept: share of full prefill's F1 on the reporting half, with its interval."""

    recompute_ratio: float
    kept: Interval
    num_questions: int


def run(args: argparse.Namespace) -> int:
    base = base_of(args)
    ratios = sorted({*numbers("ratios", args.ratios), 1.0})
    if not (ratios[0] >= 0 and ratios[-1] == 1.0):
        raise ConfigError("ratios", f"must lie in [0, 1], got {args.ratios}")
    if not 0 < args.target <= 1:
        raise ConfigError("target", f"must lie in (0, 1], got {args.target}")
    choosing, reporting = (load_dataset(args.dataset, args.limit, half=h) for h in ("selection", "reporting"))
    with record_log(args.records) as log:

        def kept(ratio: float, examples: Sequence[Example]) -> Interval:
            configuration = Configuration("default", ratio, args.related_number)
            answer(args, examples, (FULL, configuration), base, log)
            return _kept(log, examples, configuration)

        ratio = smallest(ratios, lambda r: kept(r, choosing).mean >= args.target)
        tuned = Tuned(ratio, kept(ratio, reporting), len(reporting))
        chosen = {e.example_id for e in choosing}
        print(format_rows(summarise(r for r in log.records if r.example_id in chosen)))
    _report(args, tuned)
    return 0


def smallest(ratios: Sequence[float], is_enough: Callable[[float], bool]) -> float:
    """The first of ascending `ratios` that is enough, by bisection; the last one, full prefill, always is."""
    low, high = 0, len(ratios) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(ratios[middle]) else (middle + 1, high)
    return ratios[low]


def _kept(log: RecordLog, examples: Sequence[Example], configuration: Configuration) -> Interval:
    ids = {e.example_id for e in examples}
    groups = by_configuration(r for r in log.records if r.example_id in ids)
    full = {r.example_id: r.f1 for r in groups[FULL]}
    ours: list[Record] = groups[configuration]
    return bootstrap_ratio([r.f1 for r in ours], [full[r.example_id] for r in ours])


def _report(args: argparse.Namespace, tuned: Tuned) -> None:
    kept = tuned.kept
    print(
        f"\nrecompute_ratio = {tuned.recompute_ratio:g}: {100 * kept.mean:.1f} % [{100 * kept.low:.1f}, "
        f"{100 * kept.high:.1f}] of full prefill's F1 on the {tuned.num_questions} questions it was not chosen on"
    )
    if args.json:
        from fusionrag.config import ModelConfig
        from fusionrag.model import load_model
        from scripts.assembly import result

        found = result("evaluate tune", load_model(build(ModelConfig, args)), args, [asdict(tuned)])
        args.json.write_text(json.dumps(found, indent=1) + "\n")
