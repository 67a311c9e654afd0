"""Copies from host memory to the GPU by the driver itself.

A request makes hundreds of them, and torch's own copy takes the host several times as long. Drivers since CUDA 12.8
take many in one call, and leave no gaps between them. Knows nothing of KV.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

log = logging.getLogger(__name__)


class LayeredBytes(NamedTuple):
    """An object that lies alike on both sides: `head_bytes`, then layers of `layer_bytes` each.

    target, source: its addresses on the device and on the host, which must stay allocated until all copies are done.
    source: page-locked, or the host waits.
    """

    target: int
    source: int
    head_bytes: int
    layer_bytes: int


class LayerCopies:
    """Objects that cross the link together, some layers at a time."""

    def __init__(self, objects: Sequence[LayeredBytes]) -> None:
        columns = np.array(objects, dtype=np.uint64).reshape(-1, 4).T
        self._targets, self._sources, self._heads, self._layers = columns

    def queue(self, layers: slice, stream: int) -> None:
        """Queues the copy of these layers of all objects. Heads come with layer 0. stream: its handle, not 0.

        Raises RuntimeError with the driver's number for what went wrong.
        """
        begins = self._heads + self._layers * layers.start if layers.start else np.zeros_like(self._heads)
        sizes = self._heads + self._layers * layers.stop - begins
        if len(sizes):
            _driver().copy(self._targets + begins, self._sources + begins, sizes, stream)


class _Attributes(ctypes.Structure):
    """CUmemcpyAttributes of the driver API: access order, hints (type and number) for source and target, flags."""

    _fields_ = [(name, ctypes.c_int) for name in ("order", "from_type", "from_id", "to_type", "to_id", "flags")]


IN_STREAM_ORDER = 1  # CU_MEMCPY_SRC_ACCESS_ORDER_STREAM: the source is read when the stream has come to the copy


class _Driver:
    def __init__(self, library: Any) -> None:
        self._one = library.cuMemcpyHtoDAsync_v2
        self._one.argtypes = (ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p)
        self._many: Any = getattr(library, "cuMemcpyBatchAsync", None)  # None: an older driver

    def copy(self, targets: np.ndarray, sources: np.ndarray, sizes: np.ndarray, stream: int) -> None:
        """All (n,) uint64."""
        if self._many is not None:
            error = self._copy_together(targets, sources, sizes, stream)
            if not error:
                return
            log.warning("copies cross to the GPU one by one, slower: CUDA driver error %d for all at once", error)
            self._many = None
        for target, source, size in zip(targets.tolist(), sources.tolist(), sizes.tolist(), strict=True):
            error = self._one(target, source, size, stream)
            if error:
                raise RuntimeError(f"copying {size} bytes to the GPU failed: CUDA driver error {error}")

    def _copy_together(self, targets: np.ndarray, sources: np.ndarray, sizes: np.ndarray, stream: int) -> int:
        attributes, first, failed = _Attributes(IN_STREAM_ORDER), ctypes.c_size_t(0), ctypes.c_size_t(0)
        lists = (ctypes.c_void_p(column.ctypes.data) for column in (targets, sources, sizes))
        error: int = self._many(
            *lists, ctypes.c_size_t(len(sizes)), ctypes.byref(attributes), ctypes.byref(first), ctypes.c_size_t(1),
            ctypes.byref(failed), ctypes.c_void_p(stream),
        )  # fmt: skip
        return error


@cache
def _driver() -> _Driver:
    return _Driver(ctypes.CDLL("libcuda.so.1"))
