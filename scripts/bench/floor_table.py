"""The least time to first token of published shapes, by arithmetic alone: FLOPs, bytes and a machine's ceilings.

Ceilings are given, or measured here where they are not; nothing else is run. What is counted: `scripts.bench.floor`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fusionrag.config import ModelConfig
from fusionrag.cost import DecoderSize
from fusionrag.model import resolve_device
from fusionrag.types import PromptPlan, Segment, SegmentKind
from scripts.assembly import versions
from scripts.bench.floor import Ceilings, full_floor, full_flops, measure_ceilings, recompute_flops, reuse_floor
from scripts.bench.random_model import published_shape
from scripts.bench.tiers import Tier
from scripts.bench.timing import finish
from scripts.options import add_config_flags, build

DTYPE = torch.bfloat16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", default="qwen2.5-7b,llama-3.1-8b", help="comma-separated (default: %(default)s)")
    parser.add_argument(
        "--num-chunks", default="8,16,32,64,128", help="comma-separated numbers of passages (default: %(default)s)"
    )
    parser.add_argument("--chunk-tokens", type=int, default=512, help="tokens of each passage (default: %(default)s)")
    parser.add_argument("--prefix-tokens", type=int, default=32, help="in front of them (default: %(default)s)")
    parser.add_argument("--tail-tokens", type=int, default=32, help="behind them (default: %(default)s)")
    parser.add_argument("--ratios", default="0.05,0.1,0.15,0.3", help="comma-separated (default: %(default)s)")
    parser.add_argument("--recompute-depth", type=float, default=1.0, help="share of the layers (default: %(default)s)")
    parser.add_argument("--kv-codec", default="none", help="how stored KV crosses the link (default: %(default)s)")
    parser.add_argument("--matrix-tflops", type=float, help="of a large bf16 matrix product; else measured")
    parser.add_argument("--memory-gb", type=float, help="device memory read and written, GB/s; else measured")
    parser.add_argument("--link-gb", type=float, help="host to device, GB/s; else measured")
    parser.add_argument("--json", type=Path, help="write the result here as well")
    parser.add_argument("--config", type=Path, help=argparse.SUPPRESS)
    add_config_flags(parser, ModelConfig)


def run(args: argparse.Namespace) -> int:
    ceilings = _ceilings(args)
    ratios, counts = [float(r) for r in args.ratios.split(",")], [int(n) for n in args.num_chunks.split(",")]
    rows = [row for shape in args.shapes.split(",") for n in counts for row in _rows(args, shape, n, ratios, ceilings)]
    print(
        f"matrix product {ceilings.matrix_flops_per_s / 1e12:.1f} TFLOP/s, device memory "
        f"{ceilings.memory_bytes_per_s / 1e9:.0f} GB/s, link {ceilings.link_bytes_per_s / 1e9:.1f} GB/s\n"
    )
    print("\n".join(markdown(rows)))
    rounded = [{k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()} for row in rows]
    finish({"command": "bench floor", "versions": versions(), "ceilings": asdict(ceilings), "rows": rounded}, args.json)
    return 0


def _ceilings(args: argparse.Namespace) -> Ceilings:
    given = (args.matrix_tflops, args.memory_gb, args.link_gb)
    if all(given):
        return Ceilings(args.matrix_tflops * 1e12, args.memory_gb * 1e9, args.link_gb * 1e9)
    measured = measure_ceilings(resolve_device(build(ModelConfig, args).device), DTYPE)
    return Ceilings(
        args.matrix_tflops * 1e12 if args.matrix_tflops else measured.matrix_flops_per_s,
        args.memory_gb * 1e9 if args.memory_gb else measured.memory_bytes_per_s,
        args.link_gb * 1e9 if args.link_gb else measured.link_bytes_per_s,
    )


def _rows(
    args: argparse.Namespace, name: str, num_chunks: int, ratios: Sequence[float], ceilings: Ceilings
) -> Iterator[dict[str, Any]]:
    model: DecoderSize = published_shape(name, DTYPE)
    plan = _plan(args.prefix_tokens, [args.chunk_tokens] * num_chunks, args.tail_tokens)
    kv_bytes = Tier("host", args.kv_codec).num_bytes(model, [s.num_tokens for s in plan.chunks])
    full, depth = full_floor(model, plan, ceilings), args.recompute_depth
    for ratio in ratios:
        num_selected = math.ceil(round(ratio * plan.num_chunk_tokens, 6))
        floor = reuse_floor(model, plan, num_selected, depth, kv_bytes, ceilings.link_bytes_per_s, ceilings)
        yield {
            "shape": name,
            "prompt_tokens": plan.num_tokens,
            "full_tflop": full_flops(model, plan) / 1e12,
            "full_ms": full.ttft_ms,
            "kv_gb": kv_bytes / 1e9,
            "load_ms": floor.load_ms,
            "recompute_ratio": ratio,
            "recompute_tflop": recompute_flops(model, plan, num_selected, depth) / 1e12,
            "probe_ms": floor.probe_ms,
            "recompute_ms": floor.recompute_ms,
            "floor_ms": floor.ttft_ms,
            "limit": full.ttft_ms / floor.ttft_ms,
        }


def _plan(num_prefix: int, chunks: Sequence[int], num_tail: int) -> PromptPlan:
    """A prompt of these lengths; which tokens it has does not matter."""
    segments, at = [], 0
    kinds = [SegmentKind.PREFIX, *[SegmentKind.CHUNK] * len(chunks), SegmentKind.TAIL]
    for kind, length in zip(kinds, [num_prefix, *chunks, num_tail], strict=True):
        segments.append(Segment(kind, at, (0,) * length))
        at += length
    return PromptPlan(tuple(segments), (0, num_tail))


def markdown(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A table for documents: a line a shape and length. Of each ratio: TFLOP run again, floor in ms, and at most."""
    ratios = list(dict.fromkeys(r["recompute_ratio"] for r in rows))
    heads = ["shape", "tokens", "full TFLOP", "full ms", "KV GB", "load ms", "probe ms"]
    heads += [f"{100 * ratio:g} %" for ratio in ratios]
    yield "| " + " | ".join(heads) + " |"
    yield "| --- |" + " ---: |" * (len(heads) - 1)
    for begin in range(0, len(rows), len(ratios)):
        of_ratio = rows[begin : begin + len(ratios)]
        r = of_ratio[0]
        cells = [r["shape"], f"{r['prompt_tokens']:,}"]
        cells += [f"{r['full_tflop']:.1f}", f"{r['full_ms']:.1f}", f"{r['kv_gb']:.2f}", f"{r['load_ms']:.1f}"]
        cells += [f"{r['probe_ms']:.1f}"]
        cells += [f"{o['recompute_tflop']:.1f}, {o['floor_ms']:.1f}, {o['limit']:.1f}×" for o in of_ratio]
        yield "| " + " | ".join(cells) + " |"
