"""`fusionrag keys`: who may use the server. A running server follows within seconds."""

from __future__ import annotations

import argparse
import sys
from datetime import UTC, datetime

from fusionrag.errors import ConfigError
from index import Catalogue, DataDir
from index.api_keys import ApiKeys
from scripts.options import add_data_dir_flag


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("add", "list", "remove"), help="what to do")
    parser.add_argument(
        "name", nargs="?", metavar="NAME", help="whose key; what is made with it belongs to this name, and only to it"
    )
    add_data_dir_flag(parser)


def run(args: argparse.Namespace) -> int:
    if (args.name is None) != (args.action == "list"):
        needed = "takes no name" if args.action == "list" else "needs a name"
        raise ConfigError("name", f"'fusionrag keys {args.action}' {needed}")
    with Catalogue(DataDir(args.data_dir).catalogue) as catalogue:
        keys = ApiKeys(catalogue)
        if args.action == "add":
            _add(keys, args.name)
        elif args.action == "remove":
            _remove(keys, args.name)
        else:
            _list(keys)
    return 0


def _add(keys: ApiKeys, name: str) -> None:
    """The key alone goes to standard output, so that it can be piped to where it is needed."""
    key = keys.add(name)
    print("keep this key: only its hash is stored, so it cannot be shown again", file=sys.stderr)
    print(key)


def _list(keys: ApiKeys) -> None:
    for key in keys.all():
        print(f"{key.name}\tadded {datetime.fromtimestamp(key.created_at, UTC):%Y-%m-%d %H:%M} UTC")


def _remove(keys: ApiKeys, name: str) -> None:
    keys.remove(name)
    print(f"removed; what belongs to {name} is kept, and a later key of this name has it again", file=sys.stderr)
    if not keys.all():
        print("no key is left: without an api_key, the next server started here answers everybody", file=sys.stderr)
