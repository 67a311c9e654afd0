"""Copies from host memory to the GPU by the driver itself.

A request makes hundreds of them, and torch's own copy takes the host several times as long. Knows nothing of KV.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any


def copy_from_host(target: int, source: int, num_bytes: int, stream: int) -> None:
    """Queues a copy between two addresses. source: of page-locked memory, or the host waits. stream: its handle.

    Both must stay allocated until the copy is done. Raises RuntimeError with the driver's number for what went wrong.
    """
    error = _driver().cuMemcpyHtoDAsync_v2(target, source, num_bytes, stream)
    if error:
        raise RuntimeError(f"copying {num_bytes} bytes to the GPU failed: CUDA driver error {error}")


@cache
def _driver() -> Any:
    driver = ctypes.CDLL("libcuda.so.1")
    driver.cuMemcpyHtoDAsync_v2.argtypes = (ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    return driver
