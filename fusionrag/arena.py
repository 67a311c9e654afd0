"""The KV arena: the slots of all live requests, and who owns which.

Knows nothing of tokens, chunks or layers' meaning. Invariant I1: a request owns one contiguous span; slot
`span.start + i` holds the token at position `i`. Keys in the arena are rotated, values are as they come.
"""

from __future__ import annotations

from collections import deque

import torch

from fusionrag.types import Span


class FreeList:
    """Which of the places `[0, capacity)` are free. First fit; not thread-safe."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._free = [Span(0, capacity)] if capacity else []  # sorted by start, never adjacent, never empty
        self._returned: deque[Span] = deque()  # free, but not in the list yet

    @property
    def num_free(self) -> int:
        self._take_back()
        return sum(span.length for span in self._free)

    def allocate(self, length: int) -> Span | None:
        """The first gap that fits, or None if there is none now."""
        self._take_back()
        for i, gap in enumerate(self._free):
            if gap.length >= length:
                rest = Span(gap.start + length, gap.length - length)
                self._free[i : i + 1] = [rest] if rest.length else []
                return Span(gap.start, length)
        return None

    def free_later(self, span: Span) -> None:
        """Gives a span back at the next call; for finalizers, which may run in any thread and in the midst of one."""
        self._returned.append(span)

    def _take_back(self) -> None:
        while self._returned:
            self.free(self._returned.popleft())

    def free(self, span: Span) -> None:
        """Gives a span back and joins it with its free neighbours."""
        joined: list[Span] = []
        for s in sorted([*self._free, span], key=lambda s: s.start):
            if joined and joined[-1].stop > s.start:
                raise AssertionError(f"{s} freed twice")
            if joined and joined[-1].stop == s.start:
                joined[-1] = Span(joined[-1].start, joined[-1].length + s.length)
            else:
                joined.append(s)
        self._free = joined


class KVArena:
    """keys, values: (L, G, S, D). Zero-initialised, so that a masked slot can never contribute a NaN."""

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        num_slots: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_layers, num_kv_heads, num_slots, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.num_slots = num_slots
        self._free = FreeList(num_slots)

    @property
    def num_free(self) -> int:
        return self._free.num_free

    def allocate(self, num_tokens: int) -> Span | None:
        """The first gap that fits, or None if there is none now. Contents are undefined."""
        return self._free.allocate(num_tokens)

    def free(self, span: Span) -> None:
        """Gives a span back."""
        self._free.free(span)

    def view(self, layer: int, span: Span) -> tuple[torch.Tensor, torch.Tensor]:
        """keys, values: (G, N, D) views of a span; writing to them writes to the arena."""
        return self.keys[layer, :, span.start : span.stop], self.values[layer, :, span.start : span.stop]
