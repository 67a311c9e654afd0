"""Time to first token: full prefill, stock transformers and every asked-for way of reuse, on the same prompts.

TTFT runs from a ready prompt plan to the first sampled token: loading, re-positioning, probing, selecting, recomputing
and sampling included, retrieval and HTTP not. All methods take turns within each repetition, so that a noisy machine
slows all of them alike; the ratio of medians of one run is the figure to quote, against the faster of full prefill here
and stock transformers' (SDPA, with a KV cache, as its own `generate` would run it). The share of the floor is that of
`scripts.bench.floor`, with the machine's ceilings measured in the same run.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fusionrag.config import EngineConfig, ModelConfig, PromptConfig, ReuseConfig, StoreConfig
from fusionrag.engine import Engine
from fusionrag.errors import ConfigError
from fusionrag.live_request import EngineRequest
from fusionrag.model import LanguageModel, load_model, model_path
from fusionrag.preprocess.job import PreprocessJob
from fusionrag.prompt import PromptBuilder, Turn
from fusionrag.sampling import SamplingParams
from fusionrag.types import PromptChunk, PromptPlan, RequestStats
from index.types import chunk_id_of
from scripts.assembly import result
from scripts.bench.device_time import device_time
from scripts.bench.floor import Ceilings, Floor, full_floor, measure_ceilings, reuse_floor
from scripts.bench.random_model import random_model
from scripts.bench.tiers import Tier, disk_bytes_per_s, forget_files, parse_tier
from scripts.bench.timing import finish, percentiles
from scripts.evaluation.datasets import load_dataset
from scripts.evaluation.methods import parse_method
from scripts.options import add_config_flags, build
from scripts.sample import passages as sample_passages

QUESTION = "Who directed the film, and where was the director born?"
STOCK = "transformers"
Stock = Callable[[PromptPlan], float]


@dataclass(frozen=True)
class Case:
    """One line of the table: a method at a ratio, with stored KV in a tier ('-' where none is used)."""

    method: str
    recompute_ratio: float
    tier: str = "-"
    is_routed: bool = False  # the router may take another way than the one asked for


@dataclass(frozen=True)
class Measured:
    """One run. `stats` is None for stock transformers."""

    ttft_ms: float
    stats: RequestStats | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset", type=Path, help="take the text from this dataset; default: the sample corpus")
    parser.add_argument(
        "--shape", help="random weights of a published shape instead of a model: qwen2.5-7b, llama-3.1-8b, tiny"
    )
    parser.add_argument(
        "--tiers", default="host", help="where stored KV lies: device, host, disk, disk-int8 … (default: %(default)s)"
    )
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
    parser.add_argument(
        "--router", action="store_true", help="time each method with the router's choice, too; 'way' says what it took"
    )
    parser.add_argument(
        "--device-time",
        action="store_true",
        help="also tell what the GPU does in one more run of each, by kind of work",
    )
    parser.add_argument("--json", type=Path, help="write the result here as well")
    parser.add_argument("--plot", type=Path, help="write a PNG of the phases here")
    parser.add_argument("--config", type=Path, help=argparse.SUPPRESS)
    add_config_flags(parser, ModelConfig, PromptConfig, ReuseConfig, StoreConfig, EngineConfig)


def run(args: argparse.Namespace) -> int:
    tiers, cases = [parse_tier(t) for t in args.tiers.split(",")], _cases(args)
    model, stock = _load(args)
    if args.device_time and model.device.type != "cuda":
        raise ConfigError("device_time", f"kernels can be told apart on a GPU, and the model is on the {model.device}")
    prompts = PromptBuilder(model.tokenizer, build(PromptConfig, args))
    ceilings = measure_ceilings(model.device, model.dtype)
    rows: list[dict[str, Any]] = []
    for num_chunks in [int(n) for n in args.num_chunks.split(",")]:
        plan = prompts.plan(_chunks(args, prompts, num_chunks), (Turn("user", QUESTION),))
        with tempfile.TemporaryDirectory() as folder:
            rows += _Bench(args, model, stock, plan, Path(folder), ceilings).run(tiers, cases)
    _print(rows)
    if args.plot:
        plot_phases(rows, args.plot)
    finish(result("bench ttft", model, args, rows) | {"ceilings": asdict(ceilings)}, args.json)
    return 0


def _load(args: argparse.Namespace) -> tuple[LanguageModel, Stock | None]:
    if args.shape:
        model, hf = random_model(args.shape, build(ModelConfig, args))
    else:
        model, hf = load_model(build(ModelConfig, args)), None
    if not args.stock:
        return model, None
    if hf is None:
        from transformers import AutoModelForCausalLM

        path = model_path(build(ModelConfig, args))
        hf = AutoModelForCausalLM.from_pretrained(path, dtype=model.dtype, attn_implementation="sdpa")
        hf = hf.to(model.device).eval()  # type: ignore[arg-type]
    return model, _stock(hf, model)


def _stock(hf: Any, model: LanguageModel) -> Stock:
    @torch.inference_mode()
    def prefill(plan: PromptPlan) -> float:
        begin = time.perf_counter()
        ids = torch.tensor(plan.token_ids, device=model.device)[None]
        int(hf(ids, use_cache=True, logits_to_keep=1).logits[0, -1].argmax())
        return (time.perf_counter() - begin) * 1e3

    return prefill


class _Bench:
    """All cases on one prompt."""

    def __init__(
        self,
        args: argparse.Namespace,
        model: LanguageModel,
        stock: Stock | None,
        plan: PromptPlan,
        folder: Path,
        ceilings: Ceilings,
    ) -> None:
        self._args, self._model, self._stock, self._plan = args, model, stock, plan
        self._folder, self._ceilings, self._base = folder, ceilings, build(ReuseConfig, args)
        self._lengths = [s.num_tokens for s in plan.chunks]

    def run(self, tiers: Sequence[Tier], cases: Sequence[Case]) -> list[dict[str, Any]]:
        times: dict[Case, list[Measured]] = {}
        device_times: dict[Case, list[dict[str, float]]] = {}
        for tier in tiers:
            engine = self._prepared(tier)
            own = [replace(c, tier=tier.name) for c in cases]
            if tier is tiers[0]:  # what does not look at the store is timed once
                own = [Case("full", 1.0), *([Case(STOCK, 1.0)] if self._stock else []), *own]
            times |= self._measure(engine, tier, own)
            if self._args.device_time:
                device_times |= {case: device_time(partial(self._once, engine, case)) for case in own}
        full_ms = min(_median(times[c]) for c in times if c.method in ("full", STOCK))
        rate = disk_bytes_per_s(self._folder) if any(t.place == "disk" for t in tiers) else None
        by_name = {t.name: t for t in tiers}
        return [
            self._row(case, by_name.get(case.tier), measured, full_ms, rate)
            | ({"device_time_ms": device_times[case]} if case in device_times else {})
            for case, measured in times.items()
        ]

    def _prepared(self, tier: Tier) -> Engine:
        """An engine whose store holds every chunk's KV."""
        model, args = self._model, self._args
        num_bytes = tier.num_bytes(model, self._lengths)
        engine = tier.engine(model, self._folder, build(StoreConfig, args), build(EngineConfig, args), num_bytes)
        if args.router:
            engine.calibrate()
        chunks = [s.chunk for s in self._plan.chunks if s.chunk is not None]
        names, prefix = engine.prefix(self._plan.prefix.token_ids)
        token_ids_of = {c.chunk_id: c.token_ids for c in chunks}
        job = PreprocessJob(model, engine.store, names, token_ids_of, engine.config, prefix, engine.arena)
        label = f"preprocess, {tier.name}"
        for _ in tqdm(job.run(chunks), total=len(chunks), desc=label, unit="chunk", disable=None):
            pass
        return engine

    def _measure(self, engine: Engine, tier: Tier, cases: Sequence[Case]) -> dict[Case, list[Measured]]:
        times: dict[Case, list[Measured]] = {case: [] for case in cases}
        label = f"{self._plan.num_tokens} tokens, {tier.name}"
        for repeat in tqdm(range(self._args.repeats + 1), desc=label, unit="round", disable=None):
            for case in cases:
                if tier.place == "disk":
                    forget_files(self._folder)
                measured = self._once(engine, case)
                if repeat:  # the first round warms up
                    times[case].append(measured)
        return times

    def _once(self, engine: Engine, case: Case) -> Measured:
        if case.method == STOCK:
            assert self._stock is not None
            return Measured(self._stock(self._plan))
        reuse = replace(parse_method(case.method, self._base), recompute_ratio=case.recompute_ratio)
        sampling = SamplingParams(max_tokens=1, ignore_eos=True)
        request = EngineRequest("bench", self._plan, sampling, reuse, time.perf_counter())
        engine.config = replace(engine.config, route="auto" if case.is_routed else "reuse")
        stats = engine.generate(request)[-1].stats
        assert stats is not None
        return Measured(stats.ttft_ms, stats)

    def _row(
        self, case: Case, tier: Tier | None, measured: list[Measured], full_ms: float, disk_rate: float | None
    ) -> dict[str, Any]:
        stats = [m.stats for m in measured if m.stats is not None]
        depth = 1.0 if case.method == STOCK else parse_method(case.method, self._base).recompute_depth
        num_selected = stats[0].recomputed_tokens if stats else 0
        floor = self._floor(tier, num_selected, depth, disk_rate)
        phases = (
            {name: _median_of(asdict(s.phases)[name] for s in stats) for name in asdict(stats[0].phases)}
            if stats
            else {}
        )
        return {
            "method": case.method + ", routed" * case.is_routed,
            "tier": case.tier,
            "prompt_tokens": self._plan.num_tokens,
            "recompute_ratio": case.recompute_ratio,
            "way": Counter(s.way for s in stats).most_common(1)[0][0] if stats else "full",
            **percentiles("ttft_ms", [m.ttft_ms for m in measured]),
            "speedup_vs_full": round(full_ms / _median(measured), 2),
            "floor_ms": round(floor.ttft_ms, 2),
            "share_of_floor": round(floor.ttft_ms / _median(measured), 3),
            "phases_ms": {name.removesuffix("_ms"): ms for name, ms in phases.items()},
            "kv_arrival_ms": _median_of(s.arrival_ms for s in stats) if stats else 0.0,
            "n": len(measured),
        }

    def _floor(self, tier: Tier | None, num_selected: int, depth: float, disk_rate: float | None) -> Floor:
        if tier is None:
            return full_floor(self._model, self._plan, self._ceilings)
        num_bytes, rate = tier.num_bytes(self._model, self._lengths), tier.rate(self._ceilings, disk_rate)
        return reuse_floor(self._model, self._plan, num_selected, depth, num_bytes, rate, self._ceilings)


def _median(measured: Sequence[Measured]) -> float:
    return statistics.median(m.ttft_ms for m in measured)


def _median_of(values: Iterable[float]) -> float:
    return round(statistics.median(values), 2)


def _chunks(args: argparse.Namespace, prompts: PromptBuilder, num_chunks: int) -> list[PromptChunk]:
    """Passages of exactly `chunk_tokens` tokens, no two alike: of real text, or drawn where the weights are."""
    if args.shape:
        draw = torch.Generator().manual_seed(0)
        drawn = torch.randint(256, (num_chunks, args.chunk_tokens), generator=draw).tolist()
        return [PromptChunk(chunk_id_of(ids), tuple(ids)) for ids in drawn]
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
    asked = [Case(m, r) for m in args.methods.split(",") for r in ratios]
    return [Case("reuse", 0.0), *asked, *(replace(case, is_routed=True) for case in asked if args.router)]


def _print(rows: Sequence[dict[str, Any]]) -> None:
    print(
        f"{'method':<24}{'tier':<11}{'tokens':>8}{'ratio':>7}{'way':>8}{'p50 ms':>10}{'p90 ms':>10}{'speed-up':>10}"
        f"{'of floor':>10}   phases (ms)"
    )
    for row in rows:
        shown = " ".join(f"{name} {ms:.1f}" for name, ms in row["phases_ms"].items() if ms >= 0.1)
        print(
            f"{row['method']:<24}{row['tier']:<11}{row['prompt_tokens']:>8}{row['recompute_ratio']:>7}{row['way']:>8}"
            f"{row['ttft_ms_p50']:>10.1f}{row['ttft_ms_p90']:>10.1f}{row['speedup_vs_full']:>9.2f}×"
            f"{100 * row['share_of_floor']:>9.0f}%   {shown}"
        )
    for row in rows:
        elapsed = row.get("device_time_ms", [])
        for part, kinds in zip((", until scored", ", then") if len(elapsed) == 2 else ("",), elapsed, strict=False):
            shown = ", ".join(f"{kind} {ms:.1f}" for kind, ms in kinds.items())
            print(f"GPU (ms), {row['method']} {row['recompute_ratio']} {row['tier']}{part}: {shown}")


def plot_phases(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Writes a PNG: a bar a row, its phases one after the other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1 + 0.3 * len(rows)), layout="constrained")
    axis = figure.subplots()
    names = list(dict.fromkeys(name for row in rows for name in row["phases_ms"]))
    labels = [f"{r['method']} {r['recompute_ratio']:g} {r['tier']}, {r['prompt_tokens']} tokens" for r in rows]
    ends = [0.0] * len(rows)
    for name in names:
        widths = [row["phases_ms"].get(name, 0.0) for row in rows]
        if any(widths):
            axis.barh(labels, widths, left=ends, label=name)
            ends = [end + width for end, width in zip(ends, widths, strict=True)]
    rest = [max(0.0, row["ttft_ms_p50"] - end) for row, end in zip(rows, ends, strict=True)]
    axis.barh(labels, rest, left=ends, label="not told apart", color="0.8")
    axis.invert_yaxis()
    axis.set_xlabel("time to first token (ms, median)")
    axis.legend(ncols=4, loc="lower right")
    figure.savefig(path, format="png", dpi=150)
