"""Stored KV in host memory: the most recently used objects.

Knows nothing of files. Invariant: the tier never holds more than `capacity_bytes`; what it lets go lives on for as long
as a request holds it, for KV is immutable and shared (I4).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

from fusionrag.store.base import StoredHit, StoreStats
from fusionrag.store.codec import EncodedKV
from fusionrag.store.stored_object import StoredObject
from fusionrag.types import ChunkKV, KVSource, KVSpec


class HeldKV(Protocol):
    """What the tier needs to know of what it keeps."""

    @property
    def num_bytes(self) -> int: ...


Held = TypeVar("Held", bound=HeldKV)


class HostTier(Generic[Held]):
    """Least recently used first out, counted in bytes. An object larger than the tier is not kept. Thread-safe."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self._lock = threading.Lock()
        self._kv: OrderedDict[str, Held] = OrderedDict()  # least recently used first
        self._num_bytes = 0

    @property
    def num_bytes(self) -> int:
        return self._num_bytes

    def __len__(self) -> int:
        return len(self._kv)

    def get(self, digest: str) -> Held | None:
        with self._lock:
            kv = self._kv.get(digest)
            if kv is not None:
                self._kv.move_to_end(digest)
            return kv

    def add(self, digest: str, kv: Held) -> None:
        """Keeps `kv`, whose memory must not be part of something larger. An object already here stays the one."""
        if kv.num_bytes > self.capacity_bytes:
            return
        with self._lock:
            if digest in self._kv:
                self._kv.move_to_end(digest)
                return
            while self._num_bytes + kv.num_bytes > self.capacity_bytes:
                self._evict()
            self._kv[digest] = kv
            self._num_bytes += kv.num_bytes

    def evict(self) -> bool:
        """Lets the least recently used object go; False where there is none."""
        with self._lock:
            return bool(self._kv) and self._evict()

    def _evict(self) -> bool:
        self._num_bytes -= self._kv.popitem(last=False)[1].num_bytes
        return True

    def discard(self, digest: str) -> None:
        with self._lock:
            kv = self._kv.pop(digest, None)
            if kv is not None:
                self._num_bytes -= kv.num_bytes


class MemoryStore:
    """A KVStore (see `base`) that lives and dies with the process: for tests, and for evaluations that leave no files.

    KV goes through its codec, so results are those of a store on disk.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kv: dict[str, EncodedKV] = {}
        self._stats = StoreStats()

    @property
    def stats(self) -> StoreStats:
        return self._stats

    def get(self, spec: KVSpec) -> StoredHit | None:
        hit = self.recall(spec)
        with self._lock:
            self._stats = self._stats.plus(misses=int(hit is None))
        return hit

    def recall(self, spec: KVSpec) -> StoredHit | None:
        with self._lock:
            payload = self._kv.get(spec.digest)
            self._stats = self._stats.plus(hits_host=int(payload is not None))
        return None if payload is None else StoredHit(payload, KVSource.HOST)

    def put(self, spec: KVSpec, kv: ChunkKV) -> None:
        payload = StoredObject.encoded(spec, kv).payload.decoded()
        with self._lock:
            self._kv.setdefault(spec.digest, payload)

    def contains(self, spec: KVSpec) -> bool:
        return spec.digest in self._kv

    def delete(self, digest: str) -> int:
        with self._lock:
            kv = self._kv.pop(digest, None)
        return 0 if kv is None else kv.num_bytes

    def digests(self) -> Iterator[str]:
        return iter(sorted(self._kv))
