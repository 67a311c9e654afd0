"""Milliseconds a generated token, alone and in batches, against the time of reading weights and KV once.

The prompt's KV is whatever full prefill wrote; every request has its own prompt of the same length. A step runs from
the engine's call to the token on the host, sampling included.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from fusionrag.config import EngineConfig, ModelConfig, ReuseConfig
from fusionrag.engine import Engine
from fusionrag.live_request import EngineRequest
from fusionrag.model import LanguageModel, load_model
from fusionrag.sampling import SamplingParams
from fusionrag.store import MemoryStore
from fusionrag.types import PromptPlan, Segment, SegmentKind
from scripts.assembly import result
from scripts.bench.floor import Ceilings, measure_ceilings
from scripts.bench.random_model import random_model
from scripts.bench.timing import finish, percentiles
from scripts.options import add_config_flags, build

WARM_UP = 8  # tokens that are not timed: they capture what is captured once


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", help="random weights of a published shape: qwen2.5-7b, llama-3.1-8b, tiny")
    parser.add_argument("--num-tokens", type=int, default=8192, help="tokens of each prompt (default: %(default)s)")
    parser.add_argument("--batches", default="1", help="comma-separated numbers of requests (default: %(default)s)")
    parser.add_argument("--num-generated", type=int, default=64, help="tokens timed (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the result here as well")
    parser.add_argument("--config", type=Path, help=argparse.SUPPRESS)
    add_config_flags(parser, ModelConfig, EngineConfig)


def run(args: argparse.Namespace) -> int:
    config = build(ModelConfig, args)
    model = random_model(args.shape, config)[0] if args.shape else load_model(config)
    ceilings, engine = (
        measure_ceilings(model.device, model.dtype),
        Engine(model, MemoryStore(), build(EngineConfig, args)),
    )
    rows = [_measure(args, engine, ceilings, int(batch)) for batch in args.batches.split(",")]
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    finish(result("bench decode", model, args, rows), args.json)
    return 0


def _measure(args: argparse.Namespace, engine: Engine, ceilings: Ceilings, batch: int) -> dict[str, Any]:
    sampling = SamplingParams(max_tokens=WARM_UP + args.num_generated, ignore_eos=True)
    draw = torch.Generator().manual_seed(0)
    for i in range(batch):
        ids = tuple(torch.randint(200, (args.num_tokens,), generator=draw).tolist())
        plan = PromptPlan((Segment(SegmentKind.PREFIX, 0, ()), Segment(SegmentKind.TAIL, 0, ids)), (0, len(ids)))
        engine.submit(EngineRequest(str(i), plan, sampling, ReuseConfig(method="full")))
    times: list[float] = []
    while engine.has_work:
        begin = time.perf_counter()
        events = engine.step()
        if len(events) == batch and all(e.stats is None for e in events):  # every request decoded, none began or ended
            times.append((time.perf_counter() - begin) * 1e3)
    times = times[WARM_UP:]
    floor = _floor_ms(engine.model, ceilings, batch, args.num_tokens)
    return {
        "num_requests": batch,
        "context_tokens": args.num_tokens,
        **percentiles("token_ms", times),
        "floor_ms": round(floor, 3),
        "share_of_floor": round(floor / statistics.median(times), 3),
        "tokens_per_s": round(batch / statistics.median(times) * 1e3, 1),
        "n": len(times),
    }


def _floor_ms(model: LanguageModel, ceilings: Ceilings, batch: int, num_tokens: int) -> float:
    """Weights once, head included, and every request's KV once, at the memory's rate."""
    weights = model.num_active_parameters + model.shape.vocab_size * model.hidden_size
    num_bytes = weights * model.dtype.itemsize + batch * num_tokens * model.shape.kv_bytes_per_token(model.dtype)
    return num_bytes / ceilings.memory_bytes_per_s * 1e3
