"""Host memory in front of disk: the store that the engine and the offline job use.

Knows nothing of file formats or eviction. Invariant: the disk is the truth; host memory holds only what is, or a moment
ago was, on disk, as the disk would give it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

from fusionrag.config import StoreConfig
from fusionrag.store.base import StoredHit, StoreStats
from fusionrag.store.disk import DiskStore
from fusionrag.store.host import HostTier
from fusionrag.store.stored_object import StoredObject
from fusionrag.types import ChunkKV, KVSource, KVSpec


def open_store(path: str | Path, config: StoreConfig) -> TieredStore:
    """The store in folder `path`, which is made if it is not there. Raises StoreError if that cannot be done."""
    return TieredStore(DiskStore(path, config.verify_checksum), HostTier(config.host_tier_bytes))


class TieredStore:
    """A KVStore (see `base`): host memory, then disk. Whatever is read or written goes to host memory too."""

    def __init__(self, disk: DiskStore, host: HostTier) -> None:
        self._disk = disk
        self._host = host
        self._lock = threading.Lock()
        self._hits_host = 0

    @property
    def stats(self) -> StoreStats:
        return self._disk.stats.plus(hits_host=self._hits_host)

    def get(self, spec: KVSpec) -> StoredHit | None:
        digest = spec.digest
        kv = self._host.get(digest)
        if kv is not None:
            with self._lock:
                self._hits_host += 1
            return StoredHit(kv, KVSource.HOST)
        hit = self._disk.get(spec)
        if hit is not None:
            self._host.add(digest, hit.kv)
        return hit

    def put(self, spec: KVSpec, kv: ChunkKV) -> None:
        stored = StoredObject.encoded(spec, kv)
        self._disk.put_object(stored)
        self._host.add(spec.digest, stored.kv)

    def contains(self, spec: KVSpec) -> bool:
        return self._disk.contains(spec)

    def delete(self, digest: str) -> int:
        self._host.discard(digest)
        return self._disk.delete(digest)

    def written_for(self, digest: str) -> dict[str, object] | None:
        return self._disk.written_for(digest)

    def is_set_aside(self, digest: str) -> bool:
        return self._disk.is_set_aside(digest)

    def digests(self) -> Iterator[str]:
        return self._disk.digests()
