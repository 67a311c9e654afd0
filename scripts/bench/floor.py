"""The least time to first token that this machine allows, from its own ceilings.

    load       bytes of stored KV over the rate of the link that they cross
    probe      the tail's FLOPs over the matrix rate, or weights and KV over the memory's rate, whichever is longer
    recompute  FLOPs of the rows that are run again, over the matrix rate
    floor      max(load, probe + recompute): layer by layer, loading goes on beside the passes

FLOPs are those of `fusionrag.cost`: `2 P` a row for the matrix products and `4 L H D` for every (row, visible slot).
Nobody reads what would come out of the last layer whose keys and values a row is needed for: that layer does not count.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fusionrag.config import ReuseConfig
from fusionrag.cost import DecoderSize, pass_flops
from fusionrag.types import PromptPlan

MATRIX_SIDE = {"cuda": 8192, "cpu": 1024}
COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 26}
REPEATS = 10


@dataclass(frozen=True)
class Ceilings:
    """What the machine does at most, measured now."""

    matrix_flops_per_s: float
    memory_bytes_per_s: float  # read plus written, of a copy within the device's memory
    link_bytes_per_s: float  # page-locked host memory to the device; on a CPU, memory itself


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    side, num_bytes = MATRIX_SIDE[device.type], COPY_BYTES[device.type]
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source = torch.randint(0, 255, (num_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_s = _best_s(device, lambda: target.copy_(source))
    link_s = copy_s / 2
    if device.type == "cuda":
        host = source.cpu().pin_memory()
        link_s = _best_s(device, lambda: target.copy_(host, non_blocking=True))
    return Ceilings(
        matrix_flops_per_s=2 * side**3 / _best_s(device, lambda: a @ b),
        memory_bytes_per_s=2 * num_bytes / copy_s,
        link_bytes_per_s=num_bytes / link_s,
    )


@dataclass(frozen=True)
class Floor:
    """Milliseconds; see the module's head."""

    load_ms: float
    probe_ms: float
    recompute_ms: float

    @property
    def ttft_ms(self) -> float:
        return max(self.load_ms, self.probe_ms + self.recompute_ms)


def full_flops(model: DecoderSize, plan: PromptPlan) -> float:
    return share_run(model, 1.0) * pass_flops(model, plan.num_tokens, plan.num_tokens / 2)


def recompute_flops(model: DecoderSize, plan: PromptPlan, num_selected: float, recompute_depth: float) -> float:
    """Of selected rows, spread evenly over the prompt, and of the tail, which sees all of it."""
    selected = share_run(model, recompute_depth) * pass_flops(model, num_selected, plan.num_tokens / 2)
    return selected + pass_flops(model, plan.tail.num_tokens, plan.num_tokens)


def share_run(model: DecoderSize, recompute_depth: float) -> float:
    """Of the layers, those that a row is run through whose KV is wanted in this share of them."""
    num_layers = model.shape.num_layers
    return (ReuseConfig(recompute_depth=recompute_depth).recomputed_layers(num_layers) - 1) / num_layers


def full_floor(model: DecoderSize, plan: PromptPlan, ceilings: Ceilings) -> Floor:
    """Of full prefill: nothing but its FLOPs."""
    return Floor(0.0, 0.0, full_flops(model, plan) / ceilings.matrix_flops_per_s * 1e3)


def reuse_floor(
    model: DecoderSize,
    plan: PromptPlan,
    num_selected: float,
    recompute_depth: float,
    load_bytes: int,
    load_rate: float,
    ceilings: Ceilings,
) -> Floor:
    """load_bytes: of all chunks as they are stored; load_rate: bytes/s of where they come from."""
    num_tail = plan.tail.num_tokens
    tail = pass_flops(model, num_tail, plan.num_tokens)
    read = model.num_active_parameters * model.dtype.itemsize
    read += plan.num_tokens * model.shape.kv_bytes_per_token(model.dtype)
    probe_s = max(tail / ceilings.matrix_flops_per_s, read / ceilings.memory_bytes_per_s) if num_selected else 0.0
    flops = recompute_flops(model, plan, num_selected, recompute_depth)
    recompute_s = max(flops / ceilings.matrix_flops_per_s, read / ceilings.memory_bytes_per_s)
    return Floor(load_bytes / load_rate * 1e3, probe_s * 1e3, recompute_s * 1e3)


def _best_s(device: torch.device, work: Callable[[], object]) -> float:
    """Seconds of the fastest of several runs: a ceiling is what can be reached, not what is usual."""

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    times = []
    for _ in range(REPEATS):
        synchronize()
        begin = time.perf_counter()
        work()
        synchronize()
        times.append(time.perf_counter() - begin)
    return min(times)
