"""What runs on what here, and why: said by `fusionrag doctor`, decided elsewhere.

Invariant: every line is asked of the code that decides, so that what is said is what is done.
"""

from __future__ import annotations

import torch

from fusionrag.config import EngineConfig, ModelConfig, StoreConfig
from fusionrag.graphs import BATCH_SIZES, why_not_captured
from fusionrag.kernels.backend import triton, why_not
from fusionrag.loading import LAYERS_AT_ONCE
from fusionrag.memory import configured, memory_need
from fusionrag.model import LanguageModel, resolve_device

# the names by which they ask `fusionrag.kernels.backend.takes`
KERNELS = (
    "rows_attention",
    "attention_mass",
    "load",
    "prepare_rows",
    "shift",
    "mean_residual",
    "silu_mul",
    "add_norm",
    "linear_of_row",
    "swiglu_of_row",
)


def describe_backends(model: LanguageModel, engine: EngineConfig, store: StoreConfig) -> dict[str, object]:
    """One line a part: what serves it and why."""
    is_gpu, graphs = model.device.type == "cuda", why_not_captured(model)
    return {
        "dense_attention": f"{model.dense.name} ({model.dense.why})",
        "kernels": {name: _kernel(model) for name in KERNELS},
        "decoding": f"plain passes: {graphs}" if graphs else f"CUDA graphs, of up to {BATCH_SIZES[-1]} requests",
        "loading": f"beside the passes, {LAYERS_AT_ONCE} layers at a time" if is_gpu else "before the passes",
        "host_tier": _host_tier(store, is_gpu),
        "device_tier": _device_tier(store, is_gpu),
        "route": "the fastest way, as predicted" if engine.route == "auto" else "as asked for",
    }


def describe_memory(model: ModelConfig, engine: EngineConfig, store: StoreConfig) -> dict[str, str]:
    """Device memory that the configuration takes, and what is free before it is taken; empty on a CPU."""
    found = configured(model, store)
    if found is None:
        return {}
    need, (free, total) = (
        memory_need(found, engine, store.device_tier_bytes),
        torch.cuda.mem_get_info(resolve_device(model.device)),
    )
    fits = "fits" if need.total <= free else "does not fit"
    return {
        "needed": f"{_gib(need.total)}: {need}",
        "free": f"{_gib(free)} of {_gib(total)}: {fits}",
    }


def _kernel(model: LanguageModel) -> str:
    reason = why_not(model.device, model.dtype, head_dim=model.shape.head_dim)
    return f"plain torch: {reason}" if reason else f"Triton {triton.__version__}"


def _host_tier(store: StoreConfig, is_gpu: bool) -> str:
    if not store.host_tier_bytes:
        return "off (host_tier_bytes = 0)"
    kept = f"page-locked, as the codec {store.kv_codec} keeps it" if is_gpu else "decoded"
    return f"{_gib(store.host_tier_bytes)}, {kept}"


def _device_tier(store: StoreConfig, is_gpu: bool) -> str:
    if not is_gpu:
        return "none: the model is on the CPU"
    return _gib(store.device_tier_bytes) if store.device_tier_bytes else "off (device_tier_bytes = 0)"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
