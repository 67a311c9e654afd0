"""`fusionrag bench ttft | floor | decode | kernels | load | ingest`: speed. The last line is the result as JSON."""

from __future__ import annotations

import argparse

from scripts.bench import decode, floor_table, ingest, kernels, load, ttft

BENCHES = {
    "ttft": ttft,
    "floor": floor_table,
    "decode": decode,
    "kernels": kernels,
    "load": load,
    "ingest": ingest,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    benches = parser.add_subparsers(dest="bench", required=True, metavar="BENCH")
    for name, module in BENCHES.items():
        summary = (module.__doc__ or "").strip().splitlines()[0]
        module.add_arguments(benches.add_parser(name, help=summary, description=module.__doc__))


def run(args: argparse.Namespace) -> int:
    status: int = BENCHES[args.bench].run(args)
    return status
