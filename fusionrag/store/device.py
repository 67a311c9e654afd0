"""Stored KV in device memory: what was used last stays there, so that hot chunks do not cross the link again.

One buffer, blocks given out first fit: kernels then take many chunks from one base address in one launch. A chunk that
finds no room gets memory of its own for as long as it is held. Knows nothing of requests.

Invariant: bytes of a block are given out again only when nobody holds its `DeviceKV` any more.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import prod

import torch

from fusionrag.arena import FreeList
from fusionrag.store.codec import EncodedKV, TensorLayout
from fusionrag.store.link import copy_from_host
from fusionrag.types import Span

ALIGNMENT = 256  # of an object, and of its tensors where they are copied one by one
WIDEST_LOAD = 16  # bytes, of a kernel: so much "kv" is aligned wherever it lies


@dataclass(frozen=True)
class Offsets:
    """Bytes from the start of the buffer to one layer of each tensor; 0 where the codec has no scales."""

    kv: int
    key_scales: int = 0
    value_scales: int = 0


@dataclass(frozen=True, eq=False)
class DeviceKV:
    """One chunk's encoded KV at `start` of a device buffer; tensors as `codec.layout` names them.

    is_packed: they follow each other as in host memory, so that one copy brings several; else each is aligned.
    """

    buffer: torch.Tensor  # uint8 (n,)
    start: int
    codec: str
    dtype: torch.dtype
    tensors: tuple[TensorLayout, ...]
    is_packed: bool = False

    @cached_property
    def _starts(self) -> Mapping[str, int]:
        """Byte at which each tensor begins in the buffer."""
        sizes = [prod(t.shape) * t.dtype.itemsize for t in self.tensors]
        if not self.is_packed:
            sizes = [_aligned(size) for size in sizes]
        starts = accumulate(sizes, initial=self.start)
        return {t.name: start for t, start in zip(self.tensors, starts, strict=False)}

    @property
    def num_tokens(self) -> int:
        return self.tensors[-1].shape[3]

    def offsets(self, layer: int) -> Offsets:
        """Where layer `layer` begins."""
        return Offsets(**{t.name: self._starts[t.name] + layer * _layer_bytes(t) for t in self.tensors})

    @cached_property
    def _bytes_of_layers(self) -> Mapping[str, torch.Tensor]:
        """Each tensor's bytes in the buffer, uint8 (L, bytes of a layer)."""
        views = {}
        for tensor in self.tensors:
            num_layers, size = tensor.shape[0], _layer_bytes(tensor)
            views[tensor.name] = self.buffer.narrow(0, self._starts[tensor.name], num_layers * size).view(-1, size)
        return views

    @cached_property
    def _packed(self) -> tuple[int, int, int]:
        """Where the bytes begin in memory, how many stand in front of "kv", and how many a layer of that takes."""
        return self.buffer.data_ptr() + self.start, self._starts["kv"] - self.start, _layer_bytes(self.tensors[-1])

    def copy_layers_(self, payload: EncodedKV, layers: slice, stream: torch.cuda.Stream | None = None) -> None:
        """Queues the copy of these layers on the current stream, which `stream` must be on a GPU.

        Scales are small and come with layer 0, those of all layers: a copy costs the host more than the link.
        """
        first, num_layers = layers.start, layers.stop - layers.start
        if self.is_packed:
            assert payload.packed is not None
            address, kv, size = self._packed
            begin, end = (kv + first * size if first else 0), kv + layers.stop * size
            if stream is not None and payload.packed.device.type == "cpu":
                copy_from_host(address + begin, payload.packed.data_ptr() + begin, end - begin, stream.cuda_stream)
            else:
                source, at = payload.packed.narrow(0, begin, end - begin), self.start + begin
                self.buffer.narrow(0, at, end - begin).copy_(source, non_blocking=True)
            return
        for name, target in self._bytes_of_layers.items():
            source = payload.bytes_of_layers[name]
            if name == "kv":
                source, target = source.narrow(0, first, num_layers), target.narrow(0, first, num_layers)
            if name == "kv" or first == 0:
                target.copy_(source, non_blocking=True)


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
        are_packed = [_is_packed(payload) for payload, _ in payloads]
        sizes = [_room_for(payload, is_packed) for (payload, _), is_packed in zip(payloads, are_packed, strict=True)]
        spans = [self._room(size) for size in sizes]
        overflow = sum(size for size, span in zip(sizes, spans, strict=True) if span is None)
        own, reserved, at = self._room_outside(overflow), [], 0
        for (payload, digest), is_packed, size, span in zip(payloads, are_packed, sizes, spans, strict=True):
            buffer, start = (own, at) if span is None else (self._buffer, span.start)
            kv = DeviceKV(buffer, start, payload.codec, payload.dtype, payload.layout, is_packed)
            reserved.append(kv)
            if span is None:
                at += size
                self._in_overflow.append(weakref.ref(kv))
            else:
                weakref.finalize(kv, self._free.free_later, span).atexit = False
                if digest is not None:
                    self._kept[digest] = kv
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


def _is_packed(payload: EncodedKV) -> bool:
    return payload.packed is not None and (payload.num_bytes - payload.tensors["kv"].nbytes) % WIDEST_LOAD == 0


def _room_for(payload: EncodedKV, is_packed: bool) -> int:
    if is_packed:
        return _aligned(payload.num_bytes)
    return sum(_aligned(t.nbytes) for t in payload.tensors.values())


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def _layer_bytes(tensor: TensorLayout) -> int:
    return prod(tensor.shape[1:]) * tensor.dtype.itemsize
