"""Stored KV in host memory: the objects most worth keeping there.

Knows nothing of files. Invariant: the tier never holds more than `capacity_bytes`; what it lets go lives on for as long
as a request holds it, for KV is immutable and shared (I4).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
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
FILE_COST_BYTES = 1 << 20  # opening a file takes about as long as reading so many bytes of it


@dataclass
class _Entry(Generic[Held]):
    kv: Held
    num_uses: int
    value: float  # what it is worth to keep it, on the tier's own clock


class HostTier(Generic[Held]):
    """Least worth keeping first out, counted in bytes. An object larger than the tier is not kept. Thread-safe.

    Worth is GreedyDual-Size-Frequency's (Cherkasova, HPL-98-69): how often an object was used, times what a byte of it
    costs to read again – small objects cost more, for every file has to be found – on a clock that moves on with every
    object that leaves, so that what was used often long ago leaves too. Among equals the least recently used leaves.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, _Entry[Held]] = OrderedDict()  # least recently used first
        self._num_bytes = 0
        self._clock = 0.0

    @property
    def num_bytes(self) -> int:
        return self._num_bytes

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, digest: str) -> Held | None:
        with self._lock:
            return self._use(digest)

    def add(self, digest: str, kv: Held) -> None:
        """Keeps `kv`, whose memory must not be part of something larger. An object already here stays the one."""
        if kv.num_bytes > self.capacity_bytes:
            return
        with self._lock:
            if self._use(digest) is not None:
                return
            while self._num_bytes + kv.num_bytes > self.capacity_bytes:
                self._evict()
            self._entries[digest] = _Entry(kv, 0, 0.0)
            self._num_bytes += kv.num_bytes
            self._use(digest)

    def evict(self) -> bool:
        """Lets the object that is least worth keeping go; False where there is none."""
        with self._lock:
            return bool(self._entries) and self._evict()

    def discard(self, digest: str) -> None:
        with self._lock:
            entry = self._entries.pop(digest, None)
            if entry is not None:
                self._num_bytes -= entry.kv.num_bytes

    def _use(self, digest: str) -> Held | None:
        entry = self._entries.get(digest)
        if entry is None:
            return None
        self._entries.move_to_end(digest)
        entry.num_uses += 1
        entry.value = self._clock + entry.num_uses * (1 + FILE_COST_BYTES / max(entry.kv.num_bytes, 1))
        return entry.kv

    def _evict(self) -> bool:
        digest = min(self._entries, key=lambda d: self._entries[d].value)  # the first of the least: least recent
        entry = self._entries.pop(digest)
        self._clock = entry.value
        self._num_bytes -= entry.kv.num_bytes
        return True


class MemoryStore:
    """A KVStore (see `base`) that lives and dies with the process: for tests, and for evaluations that leave no files.

    KV goes through its codec, so results are those of a store on disk.
    """

    def __init__(self, is_decoded: bool = True) -> None:
        """is_decoded: KV is kept as a CPU uses it; else as the codec has it, as for a GPU."""
        self._is_decoded = is_decoded
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
        encoded = StoredObject.encoded(spec, kv).payload
        payload = encoded.decoded() if self._is_decoded else encoded
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
