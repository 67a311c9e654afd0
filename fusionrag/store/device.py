"""Stored KV in device memory: what was used last stays there, so that hot chunks do not cross the link again.

One buffer, blocks given out first fit: kernels then take many chunks from one base address in one launch. A chunk that
finds no room gets memory of its own for as long as it is held. Knows nothing of requests.

Invariant: bytes of a block are given out again only when nobody holds its `DeviceKV` any more.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fusionrag.arena import FreeList
from fusionrag.store.codec import EncodedKV, Packing
from fusionrag.store.link import LayeredBytes
from fusionrag.types import Span


@dataclass(frozen=True, eq=False)
class DeviceKV:
    """One chunk's encoded KV at byte `start` of a device buffer, uint8 (n,)."""

    buffer: torch.Tensor
    start: int
    codec: str
    dtype: torch.dtype
    num_tokens: int
    packing: Packing

    @classmethod
    def of(cls, payload: EncodedKV, buffer: torch.Tensor, start: int) -> DeviceKV:
        """Room for `payload`, whose bytes are still to be copied unless they are there."""
        return cls(buffer, start, payload.codec, payload.dtype, payload.num_tokens, payload.packing)

    def offset(self, name: str) -> int:
        """Bytes from the start of the buffer to layer 0 of this tensor; 0 where the codec has none of that name."""
        at = self.packing.starts.get(name)
        return 0 if at is None else self.start + at

    def copy_layers_(self, payload: EncodedKV, layers: slice) -> None:
        """Queues the copy of these layers on the current stream. Scales are small, and come with layer 0 for all."""
        for name, source in payload.bytes_of_layers.items():
            size, begin = self.packing.layer_bytes[name], self.start + self.packing.starts[name]
            own = layers if name == "kv" else slice(0, len(source) if layers.start == 0 else 0)
            target = self.buffer[begin + own.start * size : begin + own.stop * size]
            target.view(-1, size).copy_(source[own], non_blocking=True)

    def link(self, payload: EncodedKV) -> LayeredBytes | None:
        """What brings `payload` here over the link in one copy a run of layers; None where it does not lie that way."""
        if not self.packing.as_on_host or payload.packed is None or payload.packed.device.type != "cpu":
            return None
        source, packing = payload.packed.data_ptr(), self.packing
        return LayeredBytes(
            self.buffer.data_ptr() + self.start, source, packing.starts["kv"], packing.layer_bytes["kv"]
        )


class DeviceTier:
    """At most `capacity_bytes`, least recently used out first. One thread."""

    def __init__(self, capacity_bytes: int, device: torch.device) -> None:
        self._buffer = torch.empty(capacity_bytes, dtype=torch.uint8, device=device)
        self._free = FreeList(capacity_bytes)
        self._kept: OrderedDict[str, DeviceKV] = OrderedDict()  # least recently used first
        self._overflow = self._buffer[:0]  # of the latest that found no room here
        self._in_overflow: list[weakref.ref[DeviceKV]] = []

    @property
    def num_free(self) -> int:
        return self._free.num_free

    def get(self, digest: str) -> DeviceKV | None:
        kv = self._kept.get(digest)
        if kv is not None:
            self._kept.move_to_end(digest)
        return kv

    def discard(self, digest: str) -> None:
        self._kept.pop(digest, None)

    def reserve(self, payloads: Sequence[tuple[EncodedKV, str | None]]) -> list[DeviceKV]:
        """Room for each payload, whose bytes the caller copies before anybody else asks; kept under its digest.

        What finds no room here shares one buffer of its own, for as long as it is held. That is used again when nobody
        holds any of it: a request's KV is up to gigabytes, and getting those anew can take longer than the copy.
        """
        sizes = [payload.packing.num_bytes for payload, _ in payloads]
        spans = [self._room(size) for size in sizes]
        overflow = sum(size for size, span in zip(sizes, spans, strict=True) if span is None)
        own, reserved, at = self._room_outside(overflow), [], 0
        for (payload, digest), size, span in zip(payloads, sizes, spans, strict=True):
            if span is None:
                kv = DeviceKV.of(payload, own, at)
                at += size
                self._in_overflow.append(weakref.ref(kv))
            else:
                kv = DeviceKV.of(payload, self._buffer, span.start)
                weakref.finalize(kv, self._free.free_later, span).atexit = False
                if digest is not None:
                    self._kept[digest] = kv
            reserved.append(kv)
        return reserved

    def _room_outside(self, num_bytes: int) -> torch.Tensor:
        """At least `num_bytes` that nobody holds."""
        if num_bytes == 0:
            return self._overflow
        is_free = all(kv() is None for kv in self._in_overflow)
        if not is_free or num_bytes > len(self._overflow):
            self._overflow = self._buffer[:0]  # gone first, if nobody holds it: there may not be room for both
            self._overflow = torch.empty(num_bytes, dtype=torch.uint8, device=self._buffer.device)
        self._in_overflow = []
        return self._overflow

    def _room(self, num_bytes: int) -> Span | None:
        if num_bytes > self._free.capacity:
            return None
        while (span := self._free.allocate(num_bytes)) is None:
            if not self._kept:
                return None
            self._kept.popitem(last=False)
        return span
