"""Whether all fits a GPU, by arithmetic: what is counted, what is refused, and that what is suggested instead fits."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

from fusionrag.config import EngineConfig, ModelConfig, StoreConfig
from fusionrag.errors import ConfigError, ModelError
from fusionrag.memory import Footprint, check_device_memory, check_memory, footprint, memory_need, suggestion
from scripts.bench.random_model import SHAPES

GIB = 1 << 30
BF16 = torch.bfloat16


def published(name: str, kv_codec: str = "none", max_model_len: int = 0) -> Footprint:
    settings = dict(SHAPES[name])
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    return footprint(config, BF16, kv_codec, max_model_len)


@pytest.fixture(scope="module")
def qwen() -> Footprint:
    return published("qwen2.5-7b")


def test_weights_are_those_of_the_model(family, make_model):
    model = make_model(family)
    hf = model._hf
    found = footprint(hf.config, torch.float32, "none")
    assert found.weights == sum(t.nbytes for t in (*hf.parameters(), *hf.buffers()))
    arena = model.new_arena(7)
    assert 7 * found.slot == arena.keys.nbytes + arena.values.nbytes


def test_a_published_shape_takes_what_its_card_says(qwen):
    assert qwen.weights == pytest.approx(2 * 7.62e9, rel=0.01)  # 7.61 B parameters
    assert qwen.slot == qwen.stored_token == 57344
    assert published("qwen2.5-7b", "int8").stored_token == pytest.approx(57344 / 2, rel=0.05)


def test_what_is_counted_adds_up(qwen):
    need = memory_need(qwen, EngineConfig(arena_tokens=65536), 2 * GIB)
    assert need.arena == 65536 * 57344
    assert need.device_tier + need.kv_on_its_way == 65536 * 57344, "the longest prompt has room, wherever"
    assert need.total == sum(
        (need.weights, need.arena, need.device_tier, need.kv_on_its_way, need.activations, need.workspace)
    )
    assert 1 * GIB < need.activations < 4 * GIB  # 16,384 rows that are 18,944 wide in the MLP, three times


def test_what_fits_exactly_is_taken_and_one_byte_less_is_not(qwen):
    engine = EngineConfig(arena_tokens=32768)
    total = memory_need(qwen, engine, GIB).total
    check_memory(qwen, engine, GIB, total)
    with pytest.raises(ConfigError):
        check_memory(qwen, engine, GIB, total - 1)


def test_a_device_tier_that_is_too_large_is_the_knob_that_is_named(qwen):
    with pytest.raises(
        ConfigError, match=r"device_tier_bytes: .*device tier 200.00 GiB.*device_tier_bytes = \d+ would"
    ):
        check_memory(qwen, EngineConfig(arena_tokens=32768), 200 * GIB, 80 * GIB)


def test_an_arena_that_is_too_large_is_the_knob_that_is_named(qwen):
    with pytest.raises(
        ConfigError, match=r"arena_tokens: .*80.00 GiB are free: weights 14.1\d GiB, arena 213"
    ) as refused:
        check_memory(qwen, EngineConfig(arena_tokens=4_000_000), 0, 80 * GIB)
    fitting = int(re.search(r"arena_tokens = (\d+) would fit", str(refused.value))[1])
    check_memory(qwen, EngineConfig(arena_tokens=fitting), 0, 80 * GIB)
    with pytest.raises(ConfigError):
        check_memory(qwen, EngineConfig(arena_tokens=fitting + 256), 0, 80 * GIB)


def test_an_arena_that_cuts_prompts_off_is_said_to(qwen):
    with pytest.raises(ConfigError, match="longer prompts are refused then"):
        check_memory(qwen, EngineConfig(), 0, 20 * GIB)


def test_weights_that_do_not_fit_are_not_blamed_on_a_knob(qwen):
    with pytest.raises(ModelError, match=r"14.1\d GiB.*smaller model"):
        check_memory(qwen, EngineConfig(), GIB, 12 * GIB)


@given(
    free_gib=st.floats(1, 200),
    tier_gib=st.floats(0, 100),
    arena_tokens=st.sampled_from([0, 2048, 32768, 100_000, 1_000_000, 5_000_000]),
    max_model_len=st.sampled_from([4096, 32768, 131072]),
)
def test_what_is_suggested_fits_and_changes_nothing_that_fitted(free_gib, tier_gib, arena_tokens, max_model_len, qwen):
    free, tier, engine = int(free_gib * GIB), int(tier_gib * GIB), EngineConfig(arena_tokens=arena_tokens)
    model = replace(qwen, max_model_len=max_model_len)
    need = memory_need(model, engine, tier)
    if need.total <= free:
        check_memory(model, engine, tier, free)
        return
    with pytest.raises((ConfigError, ModelError)):
        check_memory(model, engine, tier, free)
    fitting = suggestion(model, engine, tier, free)
    if fitting is None:
        smallest = memory_need(model, replace(engine, arena_tokens=1024), 0)
        assert smallest.total > free or engine.num_slots(max_model_len) < 1024
        return
    changed = replace(engine, arena_tokens=fitting.get("arena_tokens", arena_tokens))
    check_memory(model, changed, fitting.get("device_tier_bytes", tier), free)
    assert changed.num_slots(max_model_len) <= engine.num_slots(max_model_len)
    assert 0 <= fitting.get("device_tier_bytes", tier) <= tier


def test_on_a_cpu_nothing_is_refused():
    huge = EngineConfig(arena_tokens=1 << 40)
    check_device_memory(ModelConfig(device="cpu"), huge, StoreConfig(device_tier_bytes=1 << 50))
