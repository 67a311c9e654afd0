"""What `evaluate` and `evaluate tune` share: the flags of a run, and running a grid of configurations.

A killed run goes on where it stopped when `--records` names a file.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from fusionrag.config import EngineConfig, ModelConfig, PreprocessConfig, PromptConfig, ReuseConfig
from fusionrag.errors import ConfigError
from index.config import EmbeddingConfig
from scripts.evaluation.datasets import Example, Passage, load_dataset
from scripts.evaluation.neighbours import related_passages
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


def answer(
    args: argparse.Namespace,
    examples: Sequence[Example],
    grid: Sequence[Configuration],
    base: ReuseConfig,
    log: RecordLog,
) -> None:
    """Adds to the log what it lacks of every question in every configuration."""
    todo = [e for e in examples if any((e.example_id, c) not in log for c in grid)]
    most = max(c.num_related for c in grid)
    extra = read_corpus(args.related_corpus) if args.related_corpus else ()
    preprocess = replace(PreprocessConfig(), num_related=most, related_by=args.related_by, fuse_behind=args.fuse_behind)
    everything = load_dataset(args.dataset)  # also of a half or a sample: the corpus is the same
    related = related_passages(everything, extra, preprocess, build(EmbeddingConfig, args))
    threads = 1 if args.num_workers > 1 else 0
    configs = (build(ModelConfig, args), build(PromptConfig, args), build(EngineConfig, args))
    setup = Setup(*configs, base, args.fuse_behind, threads)
    tasks = [Task(e, {p: related.get(p, ()) for p in e.passages}, tuple(grid)) for e in todo]
    with tqdm(
        total=len(examples), initial=len(examples) - len(todo), unit="question", desc="evaluate", disable=None
    ) as bar:
        for records in run_tasks(setup, tasks, args.num_workers):
            for record in records:
                if record.key not in log:
                    log.append(record)
            bar.update()


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
