"""Whether a model, its arena and its device tier fit a GPU, told with the arithmetic before anything is allocated.

Knows nothing of requests. Invariant: settings that are suggested fit by the same arithmetic that refused the others.
"""

from __future__ import annotations

from bisect import bisect
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fusionrag.config import EngineConfig, ModelConfig, StoreConfig
from fusionrag.engine import MAX_ROWS_ALONE
from fusionrag.errors import ConfigError, ModelError
from fusionrag.model import model_path, resolve_device, resolve_dtype, shape_of
from fusionrag.static_passes import MAX_ROWS
from fusionrag.store.codec import KVShape, layout

WORKSPACE_BYTES = 1 << 29  # libraries' own memory, the graphs themselves, and what is lost between allocations
SLOTS_STEP = 256  # suggested numbers of slots are multiples of it
MIN_SLOTS = 1024  # fewer hold no prompt worth retrieving for
CODEC_TOKENS = 512  # of the chunk that tells how many bytes a stored token takes, scales included


@dataclass(frozen=True)
class Footprint:
    """Bytes that a model takes, from its configuration alone."""

    weights: int
    slot: int  # of the arena
    stored_token: int  # KV of one token as its codec keeps it
    row: int  # what a pass holds of one row at its widest place
    logits: int  # of one row
    max_model_len: int


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes of device memory, by what they are for."""

    weights: int
    arena: int
    device_tier: int
    kv_on_its_way: int  # of the longest prompt, beyond the device tier
    activations: int
    workspace: int = WORKSPACE_BYTES

    @property
    def total(self) -> int:
        return sum(asdict(self).values())

    def __str__(self) -> str:
        named = {name.replace("_", " ").replace("kv", "KV"): num_bytes for name, num_bytes in asdict(self).items()}
        return ", ".join(f"{name} {_gib(num_bytes)}" for name, num_bytes in named.items() if num_bytes)


def footprint(hf_config: Any, dtype: torch.dtype, kv_codec: str, max_model_len: int = 0) -> Footprint:
    """hf_config: a supported decoder's. max_model_len: 0 takes the model's own limit."""
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(hf_config, dtype=dtype)  # type: ignore[no-untyped-call]
    shape = shape_of(hf_config)
    stored = layout(kv_codec, dtype, KVShape(shape.num_layers, shape.num_kv_heads, CODEC_TOKENS, shape.head_dim))
    return Footprint(
        weights=sum(t.nbytes for t in (*hf.parameters(), *hf.buffers())),
        slot=shape.kv_bytes_per_token(dtype),
        stored_token=-(-sum(prod(t.shape) * t.dtype.itemsize for t in stored) // CODEC_TOKENS),
        row=_row_numbers(hf_config) * dtype.itemsize + 4 * shape.head_dim,  # with its rotary table, fp32
        logits=shape.vocab_size * (dtype.itemsize + 4),  # and in fp32
        max_model_len=max_model_len or hf_config.max_position_embeddings,
    )


def _row_numbers(config: Any) -> int:
    """Numbers that one row of a pass takes where a layer is at its widest: in the MLP or around the attention."""
    shape = shape_of(config)
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    attention = 2 * (queries + 2 * keys) + queries  # projected, rearranged, and what comes out
    width, chosen = config.intermediate_size, getattr(config, "num_experts_per_tok", None)
    mlp = 3 * width  # gate, up and their product
    if chosen:
        expert = getattr(config, "moe_intermediate_size", None) or width
        mlp = max(mlp, chosen * (config.hidden_size + 3 * expert))
    return int(3 * config.hidden_size + max(attention, mlp))  # the residual stream, normed, and added to


def memory_need(model: Footprint, engine: EngineConfig, device_tier_bytes: int) -> MemoryNeed:
    """What a server with these settings takes at most."""
    num_slots = engine.num_slots(model.max_model_len)
    longest = min(model.max_model_len, num_slots)
    num_rows = max(engine.max_batch_tokens, min(MAX_ROWS_ALONE, longest))
    return MemoryNeed(
        weights=model.weights,
        arena=num_slots * model.slot,
        device_tier=device_tier_bytes,
        kv_on_its_way=max(0, longest * model.stored_token - device_tier_bytes),
        activations=(num_rows + MAX_ROWS) * model.row + engine.max_num_requests * model.logits,  # of graphs, too
    )


def check_memory(model: Footprint, engine: EngineConfig, device_tier_bytes: int, free_bytes: int) -> None:
    """Raises ConfigError naming the knob to change, with a value that fits, or ModelError where none does."""
    need = memory_need(model, engine, device_tier_bytes)
    if need.total <= free_bytes:
        return
    told = f"{_gib(need.total)} of device memory are needed and {_gib(free_bytes)} are free: {need}"
    fitting = suggestion(model, engine, device_tier_bytes, free_bytes)
    if fitting is None:
        raise ModelError(f"{told}; take a smaller model, a smaller dtype or a larger GPU")
    knobs = " and ".join(f"{name} = {value}" for name, value in fitting.items())
    shorter = "arena_tokens" in fitting and fitting["arena_tokens"] < model.max_model_len
    raise ConfigError(next(iter(fitting)), f"{told}; {knobs} would fit" + "; longer prompts are refused then" * shorter)


def suggestion(
    model: Footprint, engine: EngineConfig, device_tier_bytes: int, free_bytes: int
) -> dict[str, int] | None:
    """Knobs that make it fit: a smaller device tier if that is enough, else a smaller arena. None: nothing does."""

    def total(num_slots: int, tier: int) -> int:
        return memory_need(model, replace(engine, arena_tokens=num_slots), tier).total

    num_slots = engine.num_slots(model.max_model_len)
    without = total(num_slots, 0)
    if device_tier_bytes and without <= free_bytes:
        # a tier holds what would otherwise be on its way beside it, so up to that much it costs nothing
        on_its_way = memory_need(model, engine, 0).kv_on_its_way
        return {"device_tier_bytes": min(device_tier_bytes, on_its_way + free_bytes - without)}
    steps = range(1, num_slots // SLOTS_STEP + 1)
    fitting = SLOTS_STEP * bisect(steps, free_bytes, key=lambda step: total(step * SLOTS_STEP, 0))
    if fitting < MIN_SLOTS:
        return None
    return {"arena_tokens": fitting} | ({"device_tier_bytes": 0} if device_tier_bytes else {})


def check_device_memory(model: ModelConfig, engine: EngineConfig, store: StoreConfig) -> None:
    """For the configured model and device; nothing is checked on a CPU. Raises what `check_memory` raises."""
    found = configured(model, store)
    if found is not None:
        free_bytes, _ = torch.cuda.mem_get_info(resolve_device(model.device))
        check_memory(found, engine, store.device_tier_bytes, free_bytes)


def configured(model: ModelConfig, store: StoreConfig) -> Footprint | None:
    """Of the configured model; None on a CPU, or where its configuration cannot be read, which loading it will tell."""
    device = resolve_device(model.device)
    if device.type != "cuda":
        return None
    try:
        hf_config = AutoConfig.from_pretrained(model_path(model))
    except (OSError, ValueError):
        return None
    return footprint(hf_config, resolve_dtype(model.dtype, device), store.kv_codec, model.max_model_len)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
