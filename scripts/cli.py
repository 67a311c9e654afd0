"""The console command `fusionrag`.

Commands are imported only when they run, so that one whose libraries are missing does not stop the others.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

from index.errors import FusionRAGError
from scripts.options import warn_of_unknown_variables

COMMANDS = {
    "ingest": "read documents, cut them into chunks, embed and index them",
    "delete": "remove documents from a collection, or a whole collection",
    "preprocess": "compute the KV caches of all chunks that lack them",
    "serve": "serve the OpenAI-compatible HTTP endpoint",
    "keys": "add, list or remove the API keys of a server",
    "ask": "answer one question here and now, with sources and a TTFT breakdown",
    "evaluate": "quality of every method against full prefill on a dataset",
    "bench": "measure TTFT, kernels or a running server under load",
    "doctor": "what is installed, chosen, cached, and why a chunk would miss",
}
BAD_INPUT, INTERRUPTED = 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Exit codes: 0 done, 2 bad input (message on standard error), 130 interrupted."""
    _quiet_libraries()
    args = _parse(list(sys.argv[1:] if argv is None else argv))
    logging.basicConfig(
        level=logging.INFO if args.verbose else logging.WARNING, format="%(levelname)s %(name)s: %(message)s"
    )
    warn_of_unknown_variables()
    try:
        return int(_module(args.command).run(args))
    except FusionRAGError as error:
        print(f"fusionrag {args.command}: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print(f"fusionrag {args.command}: interrupted", file=sys.stderr)
        return INTERRUPTED


def _parse(argv: list[str]) -> argparse.Namespace:
    """Only the chosen command's flags are built: `--help` of one command does not import the others."""
    parser = argparse.ArgumentParser(
        prog="fusionrag", description="Retrieval-augmented generation on reused KV caches."
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    chosen = next((word for word in argv if word in COMMANDS), None)
    for name, summary in COMMANDS.items():
        sub = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        sub.add_argument("--verbose", action="store_true", help="log what happens on the way")
        if name == chosen:
            _module(name).add_arguments(sub)
    return parser.parse_args(argv)


def _module(command: str) -> Any:
    return importlib.import_module(f"scripts.commands.{command}")


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"fusionrag {version('fusionrag-server')}"
    except PackageNotFoundError:
        return "fusionrag (not installed)"


def _quiet_libraries() -> None:
    """Progress bars of libraries off; ours are the ones that mean something."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


if __name__ == "__main__":
    sys.exit(main())
