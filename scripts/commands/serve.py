"""`fusionrag serve`: the HTTP server over one data directory."""

from __future__ import annotations

import argparse

from index.api_keys import ApiKeys
from scripts.options import CONFIGS, add_common_flags, add_config_flags, build
from server.config import IngestionConfig, ServerConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_flags(parser)
    add_config_flags(parser, ServerConfig, IngestionConfig, *CONFIGS)


def run(args: argparse.Namespace) -> int:
    from fusionrag.sweep import discard_orphans
    from fusionrag.warm_up import warm_up
    from scripts.assembly import live_collections, open_parts
    from server.run import serve

    config = build(ServerConfig, args)
    with open_parts(args) as parts:
        discard_orphans(parts.catalogue, parts.store)  # the upkeep removes their files
        engine = parts.rag.engine
        engine.calibrate()
        if engine.model.device.type == "cuda":
            warm_up(engine, parts.rag.prompts.prefix_ids, parts.rag.reuse)
        serve(parts.rag, config, live_collections(args, parts), ApiKeys(parts.catalogue))
    return 0
