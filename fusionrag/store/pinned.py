"""Page-locked host memory, from which a GPU reads at the full speed of its link and without waiting for the host.

Locking pages is slow (a tenth of a second per GiB), so it is done once per slab; blocks are given out first fit. Knows
nothing of KV. Invariant: a block is given out again only when no tensor shares its bytes any more – whoever holds a
view of one holds the block, however it was made.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections import deque

import torch

from fusionrag.arena import FreeList
from fusionrag.types import Span

SLAB_BYTES = 256 << 20  # a power of two: torch rounds locked allocations up to one
ALIGNMENT = 4096


class PinnedMemory:
    """At most `capacity_bytes`, rounded up to whole slabs, locked slab by slab when first needed. Thread-safe."""

    def __init__(self, capacity_bytes: int, slab_bytes: int = SLAB_BYTES, pin: bool = True) -> None:
        """pin: False gives ordinary memory, so that everything else can be tested without a GPU."""
        self._max_slabs, self._slab_bytes, self._pin = -(-capacity_bytes // slab_bytes), slab_bytes, pin
        self._lock = threading.Lock()
        self._slabs: list[torch.Tensor] = []
        self._free: list[FreeList] = []  # one a slab
        # Blocks that nobody holds any more. A finalizer may run anywhere, within `empty` too: it takes no lock
        self._returned: deque[tuple[int, Span]] = deque()

    def empty(self, num_bytes: int) -> torch.Tensor | None:
        """uint8 (num_bytes,), contents undefined; None where no gap is large enough."""
        size = -(-max(num_bytes, 1) // ALIGNMENT) * ALIGNMENT
        with self._lock:
            while self._returned:
                slab, span = self._returned.popleft()
                self._free[slab].free(span)
            found = self._take(size)
        if found is None:
            return None
        slab, span = found
        block = (ctypes.c_uint8 * num_bytes).from_address(self._slabs[slab].data_ptr() + span.start)
        weakref.finalize(block, self._returned.append, found).atexit = False
        return torch.frombuffer(block, dtype=torch.uint8)  # its storage keeps `block`, and with it the bytes

    def _take(self, size: int) -> tuple[int, Span] | None:
        for slab, free in enumerate(self._free):
            span = free.allocate(size)
            if span is not None:
                return slab, span
        if size > self._slab_bytes or len(self._slabs) == self._max_slabs:
            return None
        self._slabs.append(torch.empty(self._slab_bytes, dtype=torch.uint8, pin_memory=self._pin))
        self._free.append(FreeList(self._slab_bytes))
        return self._take(size)
