"""Time to first token: full prefill, stock transformers and every asked-for way of reuse, on the same prompts.

TTFT runs from a ready prompt plan to the first sampled token: loading, re-positioning, probing, selecting, recomputing
and sampling included, retrieval and HTTP not. All methods take turns within each repetition, so that a noisy machine
slows all of them alike; the ratio of medians of one run is the figure to quote. `transformers` is the stock library's
own prefill of the same tokens with SDPA attention and a KV cache, as `generate` would run it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fusionrag.config import EngineConfig, ModelConfig, PromptConfig, ReuseConfig, StoreConfig
from fusionrag.engine import Engine
from fusionrag.errors import ConfigError
from fusionrag.layout import naming
from fusionrag.live_request import EngineRequest
from fusionrag.model import LanguageModel, load_model, model_path
from fusionrag.preprocess.job import PreprocessJob
from fusionrag.prompt import PromptBuilder, Turn
from fusionrag.sampling import SamplingParams
from fusionrag.store import open_store
from fusionrag.types import Phases, PromptChunk, PromptPlan
from index.types import chunk_id_of
from scripts.assembly import result
from scripts.bench.timing import finish, percentiles
from scripts.evaluation.datasets import load_dataset
from scripts.evaluation.runner import parse_method
from scripts.options import add_config_flags, build
from scripts.sample import passages as sample_passages

QUESTION = "Who directed the film, and where was the director born?"
STOCK = "transformers"


@dataclass(frozen=True)
class Case:
    """One line of the table: a method at a ratio."""

    method: str
    recompute_ratio: float


@dataclass(frozen=True)
class Measured:
    ttft_ms: float
    phases: Phases


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset", type=Path, help="take the text from this dataset; default: the sample corpus")
    parser.add_argument("--num-chunks", default="10", help="comma-separated numbers of passages (default: %(default)s)")
    parser.add_argument("--chunk-tokens", type=int, default=512, help="tokens of each passage (default: %(default)s)")
    parser.add_argument(
        "--methods", default="default", help="comma-separated, besides full and reuse (default: %(default)s)"
    )
    parser.add_argument("--ratios", default="0.15", help="comma-separated (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each after one warm-up (default: %(default)s)")
    parser.add_argument(
        "--stock", action=argparse.BooleanOptionalAction, default=True, help="also time stock transformers"
    )
    parser.add_argument("--json", type=Path, help="write the result here as well")
    parser.add_argument("--config", type=Path, help=argparse.SUPPRESS)
    add_config_flags(parser, ModelConfig, PromptConfig, ReuseConfig, StoreConfig, EngineConfig)


def run(args: argparse.Namespace) -> int:
    model = load_model(build(ModelConfig, args))
    prompts = PromptBuilder(model.tokenizer, build(PromptConfig, args))
    stock = _load_stock(args, model) if args.stock else None
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        store_config = build(StoreConfig, args)
        store = open_store(Path(folder), store_config)
        engine = Engine(model, store, build(EngineConfig, args), store_config.kv_codec)
        for num_chunks in [int(n) for n in args.num_chunks.split(",")]:
            chunks = _chunks(args, prompts, num_chunks)
            names = naming(model, store_config.kv_codec, prompts.prefix_ids)
            job = PreprocessJob(model, store, names, {c.chunk_id: c.token_ids for c in chunks}, engine.config)
            for _ in tqdm(job.run(chunks), total=len(chunks), desc="preprocess", unit="chunk", disable=None):
                pass
            plan = prompts.plan(chunks, (Turn("user", QUESTION),))
            rows += _measure(args, engine, plan, stock)
    _print(rows)
    finish(result("bench ttft", model, args, rows), args.json)
    return 0


def _chunks(args: argparse.Namespace, prompts: PromptBuilder, num_chunks: int) -> list[PromptChunk]:
    """Passages of exactly `chunk_tokens` tokens of real text, no two alike."""
    if args.dataset:
        passages = [(p.title, p.text) for e in load_dataset(args.dataset) for p in e.passages]
    else:
        passages = sample_passages()
    needed, stream = num_chunks * args.chunk_tokens, list[int]()
    for title, text in dict.fromkeys(passages):
        stream += prompts.encode(title, text)
        if len(stream) >= needed:
            break
    if len(stream) < needed:
        raise ConfigError(
            "num_chunks", f"the text has {len(stream)} tokens, {needed} are needed; name a larger --dataset"
        )
    cut = [tuple(stream[i : i + args.chunk_tokens]) for i in range(0, needed, args.chunk_tokens)]
    return [PromptChunk(chunk_id_of(ids), ids) for ids in cut]


def _cases(args: argparse.Namespace) -> list[Case]:
    ratios = [float(r) for r in args.ratios.split(",")]
    return [Case("full", 1.0), Case("reuse", 0.0)] + [Case(m, r) for m in args.methods.split(",") for r in ratios]


def _measure(
    args: argparse.Namespace, engine: Engine, plan: PromptPlan, stock: Callable[[PromptPlan], float] | None
) -> list[dict[str, object]]:
    base, cases = build(ReuseConfig, args), _cases(args)
    times: dict[Case, list[Measured]] = {case: [] for case in cases}
    if stock is not None:
        times[Case(STOCK, 1.0)] = []
    for repeat in tqdm(range(args.repeats + 1), desc=f"{plan.num_tokens} tokens", unit="round", disable=None):
        for case in times:
            measured = (
                Measured(stock(plan), Phases()) if case.method == STOCK and stock else _ttft(engine, plan, base, case)
            )
            if repeat:  # the first round warms up
                times[case].append(measured)
    full = statistics.median(m.ttft_ms for m in times[cases[0]])
    return [_row(case, plan, measured, full) for case, measured in times.items()]


def _ttft(engine: Engine, plan: PromptPlan, base: ReuseConfig, case: Case) -> Measured:
    reuse = replace(parse_method(case.method, base), recompute_ratio=case.recompute_ratio)
    request = EngineRequest("bench", plan, SamplingParams(max_tokens=1, ignore_eos=True), reuse, time.perf_counter())
    stats = engine.generate(request)[-1].stats
    assert stats is not None
    return Measured(stats.ttft_ms, stats.phases)


def _row(case: Case, plan: PromptPlan, measured: list[Measured], full_ms: float) -> dict[str, object]:
    times = [m.ttft_ms for m in measured]
    phases = {name: round(statistics.median(asdict(m.phases)[name] for m in measured), 2) for name in asdict(Phases())}
    return {
        "method": case.method,
        "prompt_tokens": plan.num_tokens,
        "recompute_ratio": case.recompute_ratio,
        **percentiles("ttft_ms", times),
        "speedup_vs_full": round(full_ms / statistics.median(times), 2),
        "phases_ms": {name.removesuffix("_ms"): ms for name, ms in phases.items()},
        "n": len(times),
    }


def _load_stock(args: argparse.Namespace, model: LanguageModel) -> Callable[[PromptPlan], float]:
    from transformers import AutoModelForCausalLM

    path = model_path(build(ModelConfig, args))
    stock: Any = AutoModelForCausalLM.from_pretrained(path, dtype=model.dtype, attn_implementation="sdpa")
    stock = stock.to(model.device).eval()

    @torch.inference_mode()
    def prefill(plan: PromptPlan) -> float:
        ids = torch.tensor(plan.token_ids, device=model.device)[None]
        begin = time.perf_counter()
        int(stock(ids, use_cache=True, logits_to_keep=1).logits[0, -1].argmax())
        return (time.perf_counter() - begin) * 1e3

    return prefill


def _print(rows: list[dict[str, object]]) -> None:
    print(f"{'method':<24}{'tokens':>8}{'ratio':>8}{'p50 ms':>10}{'p90 ms':>10}{'speed-up':>10}   phases (ms)")
    for row in rows:
        phases = row["phases_ms"]
        assert isinstance(phases, dict)
        shown = " ".join(f"{name} {ms:.0f}" for name, ms in phases.items() if ms >= 1)
        print(
            f"{row['method']:<24}{row['prompt_tokens']:>8}{row['recompute_ratio']:>8}{row['ttft_ms_p50']:>10.0f}"
            f"{row['ttft_ms_p90']:>10.0f}{row['speedup_vs_full']:>9.2f}×   {shown}"
        )
