"""What `evaluate` and `evaluate tune` share: the flags of a run, and running a grid of configurations.

A killed run goes on where it stopped when `--records` names a file.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from fusionrag.config import EngineConfig, ModelConfig, PreprocessConfig, PromptConfig, ReuseConfig
from fusionrag.errors import ConfigError
from index.config import EmbeddingConfig
from scripts.evaluation.datasets import Example, Passage, load_dataset
from scripts.evaluation.methods import FULL, Base, Offline, offline_of
from scripts.evaluation.neighbours import outdated, related_passages
from scripts.evaluation.records import Configuration, RecordLog
from scripts.evaluation.runner import Setup, Task
from scripts.evaluation.runner import run as run_tasks
from scripts.options import add_config_flags, build


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset", type=Path, help="CacheBlend, LongBench, HotpotQA, 2Wiki or SQuAD file")
    parser.add_argument("--limit", type=int, help="a sample of this many questions, the same for the same number")
    parser.add_argument(
        "--related-corpus", type=Path, help="JSON list of {title, text}: more passages to find related ones in"
    )
    defaults = PreprocessConfig()
    for name in ("related_by", "fuse_behind"):
        flag, text = "--" + name.replace("_", "-"), f"as in preprocess (default: {getattr(defaults, name)})"
        parser.add_argument(flag, dest=name, default=getattr(defaults, name), help=text)
    parser.add_argument("--records", type=Path, help="JSONL file of all records; an interrupted run resumes from it")
    parser.add_argument(
        "--num-workers", type=int, default=1, help="processes that share the questions (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--config", type=Path, help=argparse.SUPPRESS)
    add_config_flags(parser, ModelConfig, PromptConfig, EmbeddingConfig, ReuseConfig, EngineConfig)


@contextmanager
def record_log(path: Path | None) -> Iterator[RecordLog]:
    """The run's records, in a file that is dropped at the end unless one is named."""
    with tempfile.TemporaryDirectory() as scratch:
        yield RecordLog(path or Path(scratch) / "records.jsonl")


def base_of(args: argparse.Namespace) -> Base:
    """What the knobs of a method are changes of: the flags, where they were given."""
    preprocess = replace(PreprocessConfig(), related_by=args.related_by, fuse_behind=args.fuse_behind)
    return Base(build(ReuseConfig, args), preprocess)


def answer(
    args: argparse.Namespace,
    examples: Sequence[Example],
    grid: Sequence[Configuration],
    base: Base,
    log: RecordLog,
) -> None:
    """Adds to the log what it lacks of every question in every configuration."""
    lacking = {e: [c for c in grid if (e.example_id, c) not in log] for e in examples}
    todo = {e: (FULL, *(c for c in cs if c != FULL)) for e, cs in lacking.items() if cs}
    related = _related(args, {offline_of(c, base) for cs in todo.values() for c in cs})
    threads = 1 if args.num_workers > 1 else 0
    setup = Setup(build(ModelConfig, args), build(PromptConfig, args), build(EngineConfig, args), base, threads)
    tasks = [
        Task(e, {job: {p: found.get(p, ()) for p in e.passages} for job, found in related.items()}, cs)
        for e, cs in todo.items()
    ]
    with tqdm(
        total=len(examples), initial=len(examples) - len(todo), unit="question", desc="evaluate", disable=None
    ) as bar:
        for records in run_tasks(setup, tasks, args.num_workers):
            for record in records:
                if record.key not in log:
                    log.append(record)
            bar.update()


def _related(args: argparse.Namespace, jobs: Iterable[Offline]) -> dict[Offline, dict[Passage, tuple[Passage, ...]]]:
    """For each offline job what each passage is fused behind, of the whole dataset: a half or a sample has the same."""
    extra = read_corpus(args.related_corpus) if args.related_corpus else ()
    everything, embedding = load_dataset(args.dataset), build(EmbeddingConfig, args)
    found: dict[PreprocessConfig, dict[Passage, tuple[Passage, ...]]] = {}
    for job in jobs:
        if job.preprocess not in found:
            found[job.preprocess] = related_passages(everything, extra, job.preprocess, embedding)
    return {job: outdated(found[job.preprocess], job.stale_share) for job in jobs}


def words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def numbers(name: str, text: str) -> list[float]:
    try:
        return [float(word) for word in words(text)]
    except ValueError as error:
        raise ConfigError(name, f"must be comma-separated numbers, got {text!r}") from error


def read_corpus(path: Path) -> tuple[Passage, ...]:
    try:
        return tuple(Passage(p.get("title", ""), p["text"]) for p in json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError("related_corpus", f"{path}: must be a JSON list of {{title, text}}: {error}") from error
