"""`fusionrag ask "…"`: one answer with its sources and where the time to first token went."""

from __future__ import annotations

import argparse
import uuid

from fusionrag.live_request import EngineRequest
from fusionrag.rag import Question, Rag, Source, Turn
from fusionrag.sampling import SamplingParams
from fusionrag.types import RequestStats
from scripts.assembly import open_rag
from scripts.options import CONFIGS, add_common_flags, add_config_flags

PHASES = ("queue", "retrieve", "load", "reposition", "probe", "select", "recompute", "sample")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("question", help="the question, in quotes")
    parser.add_argument("--collection", default="default", help="collection to answer from (default: %(default)s)")
    parser.add_argument(
        "--max-tokens", type=int, default=128, metavar="N", help="longest answer (default: %(default)s)"
    )
    add_common_flags(parser)
    add_config_flags(parser, *CONFIGS)


def run(args: argparse.Namespace) -> int:
    with open_rag(args) as rag:
        sampling = SamplingParams(max_tokens=args.max_tokens)
        question = Question((Turn("user", args.question),), (args.collection,), sampling=sampling)
        prepared = rag.prepare(question, uuid.uuid4().hex)
        stats = _stream(rag, prepared.request)
    print_sources(prepared.sources)
    print_ttft(stats)
    return 0


def _stream(rag: Rag, request: EngineRequest) -> RequestStats:
    rag.engine.submit(request)
    while True:
        for event in rag.engine.step():
            if event.error is not None:
                raise event.error
            print(event.text, end="", flush=True)
            if event.finish_reason is not None:
                print()
                assert event.stats is not None
                return event.stats


def print_sources(sources: tuple[Source, ...]) -> None:
    print("\nSources")
    for s in sources:
        score = f"{s.score:.3f}" if s.score is not None else "     "
        print(f"  [{s.index}] {score}  {s.title or s.text[:40]}  ({s.source}{f', page {s.page}' if s.page else ''})")


def print_ttft(stats: RequestStats) -> None:
    print(
        f"\nTime to first token {stats.ttft_ms:.0f} ms: {stats.prompt_tokens} prompt tokens, "
        f"{stats.reused_tokens} reused, "
        f"{stats.recomputed_tokens} recomputed, {stats.computed_tokens} computed" + _way(stats)
    )
    for name in PHASES:
        print(f"  {name:<10} {getattr(stats.phases, name + '_ms'):8.1f} ms")
    if stats.arrival_ms:
        print(f"  KV arrived in {stats.arrival_ms:.1f} ms, beside these")


def _way(stats: RequestStats) -> str:
    """How it got to its first token, where that is not what was asked for."""
    if stats.predicted_ms is None or stats.way == "reuse":
        return ""
    name = {"full": "full prefill", "prefix": "the first passage's KV alone"}[stats.way]
    return f"; {name} was predicted to be faster ({stats.predicted_ms:.0f} ms)"
