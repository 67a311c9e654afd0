"""Keeping computed KV: `open_store(path, config)` gives a KVStore.

    base           the contract: primitives, hits, counters
    codec          ChunkKV ↔ tensors: none, float16, int8, int4
    stored_object  spec and tensors ↔ the bytes of one file
    disk           files: durability, quarantine
    host           host memory: HostTier (bounded, the least worth keeping leaves), MemoryStore
    pinned         page-locked memory that a GPU reads at the link's full speed
    tiered         host memory in front of disk
    device         device memory in front of both; the engine's, not part of the KVStore

Read `base` first.
"""

from fusionrag.store.base import KVStore, StoredHit, StoreStats
from fusionrag.store.disk import DiskStore
from fusionrag.store.host import HostTier, MemoryStore
from fusionrag.store.tiered import TieredStore, open_store

__all__ = [
    "DiskStore",
    "HostTier",
    "KVStore",
    "MemoryStore",
    "StoreStats",
    "StoredHit",
    "TieredStore",
    "open_store",
]
