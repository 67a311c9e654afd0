"""What a GPU does with the time of one request, by kind of work: from the profiler's list of kernels.

A request that scores tokens has two parts, up to the last kernel that scores and behind it. Kernels of several streams
may run at the same time, so the kinds of a part may add up to more than its length; "no kernel" is the time in which
none ran, copies over the link aside. The profiler itself slows the host down a little.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

SCORING = "importance"
KINDS = {  # the first whose pattern is in a kernel's name
    "attention": r"_attend_kernel|_rows_attention_kernel|_join_splits|flash|fmha|sdpa",
    SCORING: r"_attention_mass",
    "KV into the span": r"_load_kernel",
    "silu(gate) · up": r"_silu_mul",
    "norm, rotation, correction": r"_add_norm|rms_?norm|layer_?norm|_prepare_rows|_mean_residual|_shift_kernel",
    "matrix products": r"gemm|gemv|nvjet|cutlass|splitK|_one_row",
}
REST, IDLE = "other kernels", "no kernel"
COPY = r"Memcpy|Memset"


@dataclass(frozen=True)
class DeviceEvent:
    """A kernel or a copy; milliseconds from the request's begin."""

    name: str
    begin: float
    end: float


def device_time(work: Callable[[], object]) -> list[dict[str, float]]:
    """Milliseconds by kind, of each part of `work`, which waits for the device itself. A GPU's."""
    for _ in range(2):  # the first run with the profiler on takes longer
        events = _profiled(work)
    return [by_kind(part) for part in parts(events)]


def _profiled(work: Callable[[], object]) -> list[DeviceEvent]:
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler, torch.profiler.record_function("request"):
        work()
    found = profiler.events() or []
    begin = min(e.time_range.start for e in found if e.name == "request")
    return [
        DeviceEvent(e.name, (e.time_range.start - begin) / 1e3, (e.time_range.end - begin) / 1e3)
        for e in found
        if e.device_type.name == "CUDA" and e.name != "request"
    ]


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), REST)


def parts(events: Iterable[DeviceEvent]) -> list[tuple[float, float, list[DeviceEvent]]]:
    """Begin, end and kernels of each part."""
    kernels = sorted((e for e in events if not re.search(COPY, e.name)), key=lambda e: e.begin)
    end = max((e.end for e in kernels), default=0.0)
    scored = max((e.end for e in kernels if kind_of(e.name) == SCORING), default=None)
    borders = [0.0, end] if scored is None else [0.0, scored, end]
    return [(begin, end, [e for e in kernels if begin <= e.begin < end]) for begin, end in pairwise(borders)]


def by_kind(part: tuple[float, float, Sequence[DeviceEvent]]) -> dict[str, float]:
    """Milliseconds of each kind that there is, most first, and those in which no kernel ran."""
    begin, end, kernels = part
    elapsed: dict[str, float] = {}
    idle, busy_until = 0.0, begin
    for event in kernels:
        kind = kind_of(event.name)
        elapsed[kind] = elapsed.get(kind, 0.0) + event.end - event.begin
        idle += max(0.0, event.begin - busy_until)
        busy_until = max(busy_until, event.end)
    elapsed = dict(sorted(elapsed.items(), key=lambda item: -item[1]))
    return {kind: round(ms, 2) for kind, ms in {**elapsed, IDLE: idle + max(0.0, end - busy_until)}.items()}
