"""`fusionrag evaluate compare A B`: what changed between two runs, question by question.

A and B are files of `--records`: every configuration that both hold is compared, A minus B. Or one configuration each,
`runs.jsonl#default@0.1@0` and `runs.jsonl#fusionrag@0.1@0`, of one file or of two. Or a method and all its rivals:
`runs.jsonl#default` is compared, at each ratio, with full prefill and everything else in B that ran at that ratio; B is
the same file if none is named.
"""

from __future__ import annotations

import argparse

from fusionrag.errors import ConfigError
from scripts.evaluation.records import Configuration, Record, by_configuration, read_records
from scripts.evaluation.report import Comparison, against_all, compare, format_comparisons


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A", help="FILE, FILE#method@ratio@num_related or FILE#method")
    parser.add_argument("b", metavar="B", nargs="?", help="FILE or FILE#method@ratio@num_related; A minus B")


def run(args: argparse.Namespace) -> int:
    path, _, method = args.a.partition("#")
    if method and "@" not in method:
        print(format_comparisons(against_all(read_records(path), read_records(args.b or path), method)))
        return 0
    if args.b is None:
        raise ConfigError("compare", f"name what to compare {args.a} with")
    a, b = _read(args.a), _read(args.b)
    if ("#" in args.a) != ("#" in args.b):
        raise ConfigError("compare", "name a configuration for both runs or for neither")
    pairs = list(zip(a, b, strict=True)) if "#" in args.a else [(c, c) for c in a if c in b]
    if not pairs:
        raise ConfigError("compare", f"{args.a} and {args.b} hold no configuration in common; name one of each with #")
    print(format_comparisons([_compare(a[left], b[right], left, right) for left, right in pairs]))
    return 0


def _compare(a: list[Record], b: list[Record], left: Configuration, right: Configuration) -> Comparison:
    found = compare(a, b)
    if found is None:
        raise ConfigError("compare", f"{left} and {right} have no question in common")
    return found


def _read(text: str) -> dict[Configuration, list[Record]]:
    """The records of FILE or of its one configuration that is named."""
    path, _, name = text.partition("#")
    groups = by_configuration(read_records(path))
    if not name:
        return groups
    wanted = parse_configuration("compare", name)
    if wanted not in groups:
        raise ConfigError("compare", f"{path} does not hold {name}")
    return {wanted: groups[wanted]}


def parse_configuration(field: str, text: str) -> Configuration:
    """'method@ratio@num_related'. Raises ConfigError naming `field`."""
    try:
        method, ratio, num_related = text.rsplit("@", 2)
        return Configuration(method, float(ratio), int(num_related))
    except ValueError as error:
        raise ConfigError(field, f"must be method@ratio@num_related, got {text!r}") from error
