"""Rows attention at several shares of rows against dense causal SDPA of all rows, one layer of the configured model.

The share of the floor is the time that the multiply-adds alone would take at the machine's own matrix speed, measured
in the same run, divided by the time taken.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

from fusionrag.config import ModelConfig
from fusionrag.kernels.row_plan import RequestRows, plan_rows
from fusionrag.kernels.rows_attention import rows_attention
from fusionrag.model import LanguageModel, load_model
from scripts.assembly import result
from scripts.bench.timing import finish
from scripts.options import add_config_flags, build

MATRIX = 1024  # side of the product that measures the ceiling


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-tokens", type=int, default=4096, help="tokens of the prompt (default: %(default)s)")
    parser.add_argument("--ratios", default="0.05,0.15,0.3,1.0", help="shares of rows (default: %(default)s)")
    parser.add_argument(
        "--repeats", type=int, default=5, help="runs of each; the fastest counts (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, help="write the result here as well")
    parser.add_argument("--config", type=Path, help=argparse.SUPPRESS)
    add_config_flags(parser, ModelConfig)


@torch.inference_mode()
def run(args: argparse.Namespace) -> int:
    model = load_model(build(ModelConfig, args))
    shape, n = model.shape, args.num_tokens
    draw = torch.Generator(model.device).manual_seed(0)
    queries, keys, values = (
        torch.randn(heads, n, shape.head_dim, device=model.device, dtype=model.dtype, generator=draw)
        for heads in (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
    )
    flops_per_s = _matrix_speed(model, args.repeats)
    dense_ms = _best_ms(
        model,
        args.repeats,
        lambda: scaled_dot_product_attention(queries[None], keys[None], values[None], is_causal=True, enable_gqa=True),
    )
    rows: list[dict[str, object]] = [{"kernel": "dense causal SDPA", "rows": n, "ms": round(dense_ms, 3)}]
    for ratio in [float(r) for r in args.ratios.split(",")]:
        chosen = torch.randperm(n, device=model.device, generator=draw)[: max(1, round(ratio * n))].sort().values
        some = queries[:, chosen].transpose(0, 1).contiguous()
        request = RequestRows(0, len(chosen), 0, n)
        plan = plan_rows(chosen, chosen, [request], shape.num_heads, shape.num_kv_heads, shape.head_dim, model.dtype)
        ms = _best_ms(model, args.repeats, partial(rows_attention, some, keys, values, plan, shape.head_dim**-0.5))
        floor_ms = 4 * shape.num_heads * shape.head_dim * float((chosen + 1).sum()) / flops_per_s * 1e3
        rows.append(
            {
                "kernel": "rows attention",
                "ratio": ratio,
                "rows": len(chosen),
                "ms": round(ms, 3),
                "speedup_vs_dense": round(dense_ms / ms, 2),
                "share_of_floor": round(floor_ms / ms, 3),
            }
        )
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    finish(result("bench kernels", model, args, rows) | {"matrix_gflops": round(flops_per_s / 1e9)}, args.json)
    return 0


def _matrix_speed(model: LanguageModel, repeats: int) -> float:
    """FLOP/s of a square matrix product in the model's dtype."""
    a = torch.randn(MATRIX, MATRIX, device=model.device, dtype=model.dtype)
    return 2 * MATRIX**3 / (_best_ms(model, 3 * repeats, lambda: a @ a) / 1e3)


def _best_ms(model: LanguageModel, repeats: int, work: Callable[[], object]) -> float:
    work()
    times = []
    for _ in range(repeats):
        model.synchronize()
        begin = time.perf_counter()
        work()
        model.synchronize()
        times.append(time.perf_counter() - begin)
    return min(times) * 1e3
