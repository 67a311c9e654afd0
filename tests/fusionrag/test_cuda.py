"""The engine on a GPU gives what it gives on the CPU: by other kernels, other ways of loading, out of other tiers."""

from __future__ import annotations

import copy

import pytest
import torch

from fusionrag.config import EngineConfig, ReuseConfig, StoreConfig
from fusionrag.engine import Engine
from fusionrag.layout import naming
from fusionrag.live_request import EngineRequest
from fusionrag.model import LanguageModel
from fusionrag.preprocess.job import PreprocessJob
from fusionrag.prompt import PromptBuilder
from fusionrag.sampling import SamplingParams
from fusionrag.store import open_store
from fusionrag.types import KVSource
from tests.conftest import PROMPT, Bench

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ATOL = {torch.float32: 2e-3, torch.bfloat16: 0.35}  # of logits whose standard deviation is about 4


@pytest.fixture(scope="session", autouse=True)
def full_fp32():
    torch.set_float32_matmul_precision("highest")


class Placed:
    """One set of weights on one device, with a store that holds the KV of all chunks, and an engine over it."""

    def __init__(self, hf, tokenizer, folder, device, dtype, codec="none", device_tier_bytes=0):
        self.model = LanguageModel(copy.deepcopy(hf).to(device, dtype), tokenizer, "tiny")
        self.bench = Bench(self.model, PromptBuilder(tokenizer, PROMPT), None)
        self.store = open_store(folder, StoreConfig(kv_codec=codec), for_gpu=device == "cuda")
        config = EngineConfig(arena_tokens=2048, route="reuse")
        self.engine = Engine(self.model, self.store, config, codec, device_tier_bytes)
        self.codec = codec

    def preprocess(self, chunks):
        names = naming(self.model, self.codec, self.bench.prompts.prefix_ids)
        token_ids_of = {c.chunk_id: c.token_ids for c in chunks}
        for _ in PreprocessJob(self.model, self.store, names, token_ids_of, self.engine.config).run(chunks):
            pass

    def logits(self, plan, **reuse):
        prefilled = self.engine.prefill(self.bench.request(plan, **reuse))
        prefilled.release()
        return prefilled.logits.float().cpu(), prefilled.stats

    def tokens(self, plan, **reuse):
        request = EngineRequest("r", plan, SamplingParams(max_tokens=8, ignore_eos=True), ReuseConfig(**reuse))
        return [event.token_id for event in self.engine.generate(request)]


FAMILIES = ["llama", "llama-llama3", "phi3-partial", "qwen2-sliding", "qwen3", "mixtral"]
WAYS = [
    {"method": "full"},
    {"method": "reuse"},
    {"recompute_ratio": 1.0},
    {"recompute_ratio": 0.15, "correction": 1.0},
    {"recompute_ratio": 0.3, "probe_layers": "all", "probe_rows": "question"},
    {"method": "fusionrag", "recompute_ratio": 0.15},
    {"method": "cacheblend", "recompute_ratio": 0.15},
    {"method": "epic", "recompute_ratio": 0.15},
]


@pytest.fixture(params=FAMILIES)
def pair(request, make_hf, make_config, tokenizer, tmp_path):
    """The same weights in fp32 on the CPU and on the GPU, and five chunks, each behind two others."""
    hf = make_hf(make_config(request.param, hidden_size=96, head_dim=16), "eager")
    pair = [Placed(hf, tokenizer, tmp_path / d, d, torch.float32) for d in ("cpu", "cuda")]
    chunks = pair[0].bench.with_neighbours(pair[0].bench.chunks(40, 64, 33, 50, 21), 2)
    for placed in pair:
        placed.preprocess(chunks)
    return (*pair, pair[0].bench.plan(chunks))


def test_every_way_of_reuse_gives_the_logits_of_the_cpu(pair):
    cpu, gpu, plan = pair
    for way in WAYS:
        expected, _ = cpu.logits(plan, **way)
        found, _ = gpu.logits(plan, **way)
        assert expected.std() > 0.5
        torch.testing.assert_close(found, expected, rtol=0, atol=ATOL[torch.float32], msg=lambda m, w=way: f"{w}: {m}")


def test_ratio_1_is_full_prefill_and_stock_transformers(pair):
    _, gpu, plan = pair
    full, _ = gpu.logits(plan, method="full")
    one, _ = gpu.logits(plan, recompute_ratio=1.0)
    torch.testing.assert_close(one, full, rtol=0, atol=1e-4)


def test_decoding_gives_the_tokens_of_the_cpu(pair):
    cpu, gpu, plan = pair
    for way in ({"method": "full"}, {"recompute_ratio": 0.3}):
        assert gpu.tokens(plan, **way) == cpu.tokens(plan, **way)


@pytest.mark.parametrize("codec", ["none", "float16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tier_brings_the_same_kv(dtype, codec, make_hf, make_config, tokenizer, tmp_path):
    """Cold from disk, from page-locked memory, and from the device: bit for bit the same span."""
    hf = make_hf(make_config("llama", hidden_size=96, head_dim=16), "eager")
    placed = Placed(hf, tokenizer, tmp_path, "cuda", dtype, codec, device_tier_bytes=1 << 24)
    chunks = placed.bench.chunks(40, 64, 33)
    placed.preprocess(chunks)
    plan, spans, sources = placed.bench.plan(chunks), [], []
    cold = open_store(tmp_path, StoreConfig(kv_codec=codec), for_gpu=True)
    warm = Engine(placed.model, cold, placed.engine.config, codec, 1 << 24)
    host = Engine(placed.model, cold, placed.engine.config, codec, 0)
    for engine in (warm, warm, host):  # disk, device, host
        prefilled = engine.prefill(placed.bench.request(plan, method="reuse"))
        slots = slice(prefilled.span.start, prefilled.span.start + plan.tail.start)
        spans.append((engine.arena.keys[:, :, slots].clone(), engine.arena.values[:, :, slots].clone()))
        sources.append({r.source for r in prefilled.stats.chunks})
        prefilled.release()
    assert sources == [{KVSource.DISK}, {KVSource.DEVICE}, {KVSource.HOST}]
    for keys, values in spans[1:]:
        assert torch.equal(keys, spans[0][0]) and torch.equal(values, spans[0][1])


def test_bf16_stays_near_fp32(make_hf, make_config, tokenizer, tmp_path):
    hf = make_hf(make_config("llama", hidden_size=96, head_dim=16), "eager")
    exact = Placed(hf, tokenizer, tmp_path / "a", "cpu", torch.float32)
    rough = Placed(hf, tokenizer, tmp_path / "b", "cuda", torch.bfloat16)
    chunks = exact.bench.chunks(40, 64, 33)
    for placed in (exact, rough):
        placed.preprocess(chunks)
    plan = exact.bench.plan(chunks)
    for way in ({"method": "full"}, {"method": "reuse"}, {"method": "epic", "recompute_ratio": 0.2}):
        difference = (rough.logits(plan, **way)[0] - exact.logits(plan, **way)[0]).abs()
        assert difference.mean() < ATOL[torch.bfloat16], way


def test_requests_that_come_and_go_do_not_disturb_each_other(make_hf, make_config, tokenizer, tmp_path):
    """Spans are given out again while KV of a cancelled request is still on its way."""
    hf = make_hf(make_config("llama", hidden_size=96, head_dim=16), "eager")
    placed = Placed(hf, tokenizer, tmp_path, "cuda", torch.float32)
    chunks = placed.bench.chunks(200, 300, 250, 220)
    placed.preprocess(chunks)
    plan, other = placed.bench.plan(chunks), placed.bench.plan(chunks[::-1])
    expected = placed.tokens(plan, recompute_ratio=0.2)
    for _ in range(20):
        placed.engine.submit(placed.bench.request(other, "gone", recompute_ratio=0.2))
        placed.engine._admit()
        placed.engine.cancel("gone")
        assert placed.tokens(plan, recompute_ratio=0.2) == expected
