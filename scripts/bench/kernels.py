"""Each kernel against its reference and the best library call, and against what the machine can do at most.

The ceilings are measured in the same run: a large matrix product in the dtype, and a copy in device memory, counting
bytes read and bytes written. A kernel's share is its own operations, or the bytes that it must move, per second over
that. Without `--preset` or `--heads` the shapes are those of the configured model.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from fusionrag.config import ModelConfig
from fusionrag.errors import ConfigError
from fusionrag.model import model_path, resolve_device, resolve_dtype
from scripts.assembly import versions
from scripts.bench.timing import finish
from scripts.options import add_config_flags, build

LAUNCHES_PER_GRAPH = 8  # so that the time of a replay is not that of starting it


@dataclass(frozen=True)
class Shape:
    """Of a decoder, as far as kernels see it."""

    name: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int


PRESETS = {
    "qwen2.5-7b": Shape("qwen2.5-7b", 28, 28, 4, 128, 18944),
    "llama-3.1-8b": Shape("llama-3.1-8b", 32, 32, 8, 128, 14336),
}


@dataclass(frozen=True)
class Bench:
    """Where and how often is measured. tflops, gbs: the machine's ceilings."""

    device: torch.device
    dtype: torch.dtype
    repeats: int
    ratios: tuple[float, ...]
    tflops: float = 0.0
    gbs: float = 0.0

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.randn(*shape, device=self.device, dtype=dtype or self.dtype)

    def ms(self, *works: Callable[[], object]) -> float:
        """Median milliseconds of one of `works`, which do the same on different data, so that no cache keeps it."""
        for work in works:
            work()
        if self.device.type != "cuda":
            return min(_elapsed_ms(work) for work in works for _ in range(self.repeats))  # the least disturbed
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        times = []
        for _ in range(self.repeats):
            begin.record()
            for work in works:
                work()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / len(works))
        return float(statistics.median(times))

    def replay_ms(self, *works: Callable[[], object]) -> float:
        """The same of a captured graph: without the time that Python takes to launch."""
        if self.device.type != "cuda":
            return self.ms(*works)
        self.ms(*works)
        launches = [works[i % len(works)] for i in range(max(LAUNCHES_PER_GRAPH, len(works)))]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for work in launches:
                work()
        return self.ms(graph.replay) / len(launches)

    def row(
        self, kernel: str, case: str, ms: float, flops: float = 0, num_bytes: float = 0, **more: Any
    ) -> dict[str, Any]:
        """One line of the result. flops, num_bytes: the least that the work takes."""
        found: dict[str, Any] = {"kernel": kernel, "case": case, "ms": round(ms, 4)}
        if flops:
            tflops = flops / ms / 1e9
            found |= {"tflops": round(tflops, 2), "share_of_matrix_ceiling": round(tflops / self.tflops, 3)}
        if num_bytes:
            gbs = num_bytes / ms / 1e6
            found |= {"gbs": round(gbs, 1), "share_of_copy_ceiling": round(gbs / self.gbs, 3)}
        for name, value in more.items():
            if value is None:
                continue
            found[name] = round(value, 4) if isinstance(value, float) else value
        return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", choices=PRESETS, help="shapes of a well-known model; no model is loaded")
    parser.add_argument("--heads", type=int, help="query heads, with --kv-heads and --head-dim; no model is loaded")
    parser.add_argument("--kv-heads", type=int, help="key and value heads")
    parser.add_argument("--head-dim", type=int, help="size of a head")
    parser.add_argument("--num-tokens", type=int, default=4096, help="tokens of the prompt (default: %(default)s)")
    parser.add_argument("--ratios", default="0.05,0.15,0.3,1.0", help="shares of rows (default: %(default)s)")
    parser.add_argument("--only", default="", help="kernels to measure, by name, separated by commas (default: all)")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the result here as well")
    parser.add_argument("--config", type=Path, help=argparse.SUPPRESS)
    add_config_flags(parser, ModelConfig)


@torch.inference_mode()
def run(args: argparse.Namespace) -> int:
    from scripts.bench.kernel_cases import CASES

    config = build(ModelConfig, args)
    device = resolve_device(config.device)
    torch.manual_seed(0)
    ratios = tuple(float(r) for r in args.ratios.split(","))
    bench = with_ceilings(Bench(device, resolve_dtype(config.dtype, device), args.repeats, ratios))
    shape = _shape(args, config)
    wanted = args.only.split(",") if args.only else list(CASES)
    if unknown := [name for name in wanted if name not in CASES]:
        raise ConfigError("only", f"unknown kernel {unknown[0]!r}; one of {', '.join(CASES)}")
    rows = []
    for name in wanted:
        for row in CASES[name](bench, shape, args.num_tokens):
            rows.append(row)
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    finish(
        {
            "command": "bench kernels",
            "versions": versions(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
            "dtype": str(bench.dtype).removeprefix("torch."),
            "shape": vars(shape),
            "num_tokens": args.num_tokens,
            "matrix_tflops": round(bench.tflops, 3),
            "copy_gbs": round(bench.gbs, 1),
            "rows": rows,
        },
        args.json,
    )
    return 0


def with_ceilings(bench: Bench) -> Bench:
    """Measures them: a square matrix product and a copy that no cache holds."""
    is_cuda = bench.device.type == "cuda"
    side, num_bytes = (8192, 1 << 30) if is_cuda else (1024, 1 << 27)
    left, right = bench.random(side, side), bench.random(side, side)
    product_ms = bench.ms(lambda: left @ right)
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=bench.device).random_()
    target = torch.empty_like(source)
    copy_ms = bench.ms(lambda: target.copy_(source))
    tflops, gbs = 2 * side**3 / product_ms / 1e9, 2 * num_bytes / copy_ms / 1e6
    print(f"ceilings: matrix product {tflops:.2f} TFLOP/s, copy {gbs:.0f} GB/s", flush=True)
    return replace(bench, tflops=tflops, gbs=gbs)


def _shape(args: argparse.Namespace, config: ModelConfig) -> Shape:
    if args.preset:
        return PRESETS[args.preset]
    own: Sequence[int | None] = (args.heads, args.kv_heads, args.head_dim)
    if all(own):
        return Shape("custom", 4, args.heads, args.kv_heads, args.head_dim, 4 * args.heads * args.head_dim)
    if any(own):
        raise ConfigError("heads", "--heads, --kv-heads and --head-dim go together")
    found = AutoConfig.from_pretrained(model_path(config))
    head_dim = getattr(found, "head_dim", None) or found.hidden_size // found.num_attention_heads
    return Shape(
        config.model,
        found.num_hidden_layers,
        found.num_attention_heads,
        found.num_key_value_heads,
        head_dim,
        found.intermediate_size,
    )


def _elapsed_ms(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return (time.perf_counter() - begin) * 1e3
