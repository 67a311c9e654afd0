"""Host memory in front of disk: the store that the engine and the offline job use.

Knows nothing of file formats or eviction. Invariant: the disk is the truth; host memory holds only what is, or a moment
ago was, on disk – decoded for a CPU, which then need not do it for every request; as it is on disk and page-locked for
a GPU, so that link and memory carry the codec's bytes, not the model's.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import torch

from fusionrag.config import StoreConfig
from fusionrag.store.base import StoredHit, StoreStats
from fusionrag.store.codec import EncodedKV
from fusionrag.store.disk import DiskStore, pageable
from fusionrag.store.host import HostTier
from fusionrag.store.pinned import PinnedMemory
from fusionrag.store.stored_object import StoredObject
from fusionrag.types import ChunkKV, KVSource, KVSpec


def open_store(path: str | Path, config: StoreConfig, for_gpu: bool = False) -> TieredStore:
    """The store in folder `path`, which is made if it is not there. Raises StoreError if that cannot be done."""
    pinned = PinnedMemory(config.host_tier_bytes) if for_gpu and config.host_tier_bytes else None
    return TieredStore(DiskStore(path, config.verify_checksum), HostTier(config.host_tier_bytes), pinned)


class TieredStore:
    """A KVStore (see `base`): host memory, then disk. Whatever is read or written goes to host memory too."""

    def __init__(self, disk: DiskStore, host: HostTier[EncodedKV], pinned: PinnedMemory | None = None) -> None:
        """pinned: where host memory's objects lie, kept as encoded; None keeps them decoded in ordinary memory."""
        self._disk, self._host, self._pinned = disk, host, pinned
        self._lock = threading.Lock()
        self._hits_host = 0

    @property
    def stats(self) -> StoreStats:
        return self._disk.stats.plus(hits_host=self._hits_host)

    def get(self, spec: KVSpec) -> StoredHit | None:
        if (hit := self.recall(spec)) is not None:
            return hit
        hit = self._disk.get(spec, self._allocate)
        if hit is None:
            return None
        payload = hit.payload if self._pinned else hit.payload.decoded()
        self._host.add(spec.digest, payload)
        return StoredHit(payload, hit.source)

    def recall(self, spec: KVSpec) -> StoredHit | None:
        payload = self._host.get(spec.digest)
        if payload is None:
            return None
        with self._lock:
            self._hits_host += 1
        return StoredHit(payload, KVSource.HOST)

    def put(self, spec: KVSpec, kv: ChunkKV) -> None:
        stored = StoredObject.encoded(spec, kv)
        self._disk.put_object(stored)
        self._host.add(spec.digest, self._kept(stored.payload))

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

    def _kept(self, payload: EncodedKV) -> EncodedKV:
        """As host memory keeps it."""
        if self._pinned is None:
            return payload.decoded()
        block, copies = self._allocate(payload.num_bytes), {}
        ends = accumulate(tensor.nbytes for tensor in payload.tensors.values())
        for (name, tensor), end in zip(payload.tensors.items(), ends, strict=True):
            copies[name] = block[end - tensor.nbytes : end].view(tensor.dtype).view(tensor.shape)
            copies[name].copy_(tensor)
        return EncodedKV(payload.codec, payload.dtype, copies)

    def _allocate(self, num_bytes: int) -> torch.Tensor:
        """Page-locked while there is any, at the expense of what is least worth keeping; else ordinary memory."""
        if self._pinned is None or num_bytes > self._host.capacity_bytes:
            return pageable(num_bytes)
        while (block := self._pinned.empty(num_bytes)) is None:
            if not self._host.evict():
                return pageable(num_bytes)
        return block
