"""Moments of a request's way, on the host and on the device, and the time between two of them.

On a GPU the host runs ahead of the device: the time of a phase is that between two events on the stream, which can be
read only later, when the device has come past both. Knows nothing of phases' names.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Mark:
    """One moment. `event` is None where the device is the host."""

    seconds: float
    event: torch.cuda.Event | None = None

    @classmethod
    def now(cls, device: torch.device) -> Mark:
        """The present moment of the host, and of the device's current stream when it gets there."""
        event = None
        if device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(device))
        return cls(time.perf_counter(), event)

    def ms_until(self, later: Mark) -> float:
        """Milliseconds of the device's time; the device must have come past both."""
        if self.event is None or later.event is None:
            return (later.seconds - self.seconds) * 1e3
        return float(self.event.elapsed_time(later.event))
