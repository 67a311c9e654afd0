"""`fusionrag evaluate links`: how often the passages that a question needs together are stored together.

Seconds instead of hours: only texts are looked at, no answer is given. For each number of related chunks, the share of
the two-step questions in which one gold passage is stored behind the other, and in which it is the right one.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from fusionrag.config import PreprocessConfig
from fusionrag.errors import ConfigError
from index.config import EmbeddingConfig
from scripts.commands.evaluate_grid import read_corpus
from scripts.evaluation.datasets import HALVES, load_dataset
from scripts.evaluation.links import format_rows, link_rows, two_step
from scripts.evaluation.neighbours import related_passages
from scripts.options import add_config_flags, build


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset", type=Path, help="CacheBlend, LongBench, HotpotQA, 2Wiki or SQuAD file")
    parser.add_argument("--half", choices=HALVES, help="every other question; the corpus is the whole file's")
    parser.add_argument("--related-corpus", type=Path, help="JSON list of {title, text}: more passages of the corpus")
    parser.add_argument(
        "--numbers", default="1,2,3,6", help="of related chunks, comma-separated (default: %(default)s)"
    )
    parser.add_argument("--config", type=Path, help=argparse.SUPPRESS)
    add_config_flags(parser, PreprocessConfig, EmbeddingConfig)


def run(args: argparse.Namespace) -> int:
    examples = load_dataset(args.dataset, half=args.half)
    if not two_step(examples):
        raise ConfigError("dataset", f"{args.dataset} has no question of two steps whose gold passages are marked")
    everything, config = load_dataset(args.dataset), build(PreprocessConfig, args)
    extra = read_corpus(args.related_corpus) if args.related_corpus else ()
    related = {
        num: related_passages(everything, extra, replace(config, num_related=num), build(EmbeddingConfig, args))
        for num in _numbers(args.numbers)
    }
    print(format_rows(link_rows(examples, related)))
    return 0


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError as error:
        raise ConfigError("numbers", f"must be comma-separated integers, got {text!r}") from error
    if min(numbers) < 1:
        raise ConfigError("numbers", f"must be at least 1, got {text!r}")
    return numbers
