"""`fusionrag serve`: the HTTP server over one data directory."""

from __future__ import annotations

import argparse

from scripts.options import CONFIGS, add_common_flags, add_config_flags, build
from server.config import ServerConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_flags(parser)
    add_config_flags(parser, ServerConfig, *CONFIGS)


def run(args: argparse.Namespace) -> int:
    from scripts.assembly import open_rag
    from server.run import serve

    config = build(ServerConfig, args)
    with open_rag(args) as rag:
        serve(rag, config)
    return 0
