"""Copies from host memory to the GPU by the driver itself.

A request makes hundreds of them, and torch's own copy takes the host several times as long. Knows nothing of KV.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any


@dataclass(frozen=True)
class LayeredBytes:
    """An object that lies alike on both sides: `head_bytes`, then layers of `layer_bytes` each.

    target, source: its addresses on the device and on the host, which must stay allocated until all copies are done.
    source: page-locked, or the host waits.
    """

    target: int
    source: int
    head_bytes: int
    layer_bytes: int


def copy_layers(objects: Sequence[LayeredBytes], layers: slice, stream: int) -> None:
    """Queues the copy of these layers of all objects. Heads come with layer 0. stream: its handle.

    Raises RuntimeError with the driver's number for what went wrong.
    """
    copy = _driver().cuMemcpyHtoDAsync_v2
    first, stop = layers.start, layers.stop
    for o in objects:
        begin = o.head_bytes + first * o.layer_bytes if first else 0
        num_bytes = o.head_bytes + stop * o.layer_bytes - begin
        error = copy(o.target + begin, o.source + begin, num_bytes, stream)
        if error:
            raise RuntimeError(f"copying {num_bytes} bytes to the GPU failed: CUDA driver error {error}")


@cache
def _driver() -> Any:
    driver = ctypes.CDLL("libcuda.so.1")
    driver.cuMemcpyHtoDAsync_v2.argtypes = (ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    return driver
