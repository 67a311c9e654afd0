"""The contract of a KV store. Its primitives:

    get(spec)       the stored KV of exactly this spec, or None; never raises: a bad object is set aside and is a miss
    recall(spec)    as `get`, of what is in host memory alone; a miss is not counted
    put(spec, kv)   keeps `kv` under `spec.digest`; idempotent; durable when it returns; StoreError if it cannot
    contains(spec)  whether an object of this name is there; does not read its payload
    delete(digest)  removes an object, bytes freed (0: there was none); KV already handed out stays valid
    digests()       the names of all objects, ascending
    stats           counters since the store was opened: a snapshot

Knows nothing of models, requests or positions. Invariants: what `get` returns stands for what `decode(encode(kv))` of
the spec's codec gives, whichever tier it comes from and however it is kept there (equal specs ⇔ interchangeable bytes,
I5); it is in host memory, shared between all who asked for it, and nobody may write to it (I4). All methods may be
called from several threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

from fusionrag.errors import StoreError
from fusionrag.store.codec import EncodedKV, decode
from fusionrag.types import ChunkKV, KVSource, KVSpec


class BadObject(StoreError):
    """A stored object is not what its name promises. Never leaves the store: the object is set aside instead."""


@dataclass(frozen=True)
class StoredHit:
    """What was stored, in host memory, and the tier it came from."""

    payload: EncodedKV
    source: KVSource

    @property
    def kv(self) -> ChunkKV:
        """Decoded; not kept with the payload, which a tier counts by its encoded bytes alone."""
        payload = self.payload
        return payload.kv if payload.codec == "none" else decode(payload.tensors, payload.codec, payload.dtype)


@dataclass(frozen=True)
class StoreStats:
    """hits_host + hits_disk + misses is the number of `get` calls; a quarantined object is also a miss."""

    hits_host: int = 0
    hits_disk: int = 0
    misses: int = 0
    quarantined: int = 0
    bytes_read: int = 0  # from disk
    bytes_written: int = 0  # to disk

    def plus(self, **counts: int) -> StoreStats:
        return replace(self, **{name: getattr(self, name) + count for name, count in counts.items()})


class KVStore(Protocol):
    """See the module docstring for the contract."""

    @property
    def stats(self) -> StoreStats: ...

    def get(self, spec: KVSpec) -> StoredHit | None: ...

    def recall(self, spec: KVSpec) -> StoredHit | None: ...

    def put(self, spec: KVSpec, kv: ChunkKV) -> None: ...

    def contains(self, spec: KVSpec) -> bool: ...

    def delete(self, digest: str) -> int: ...

    def digests(self) -> Iterator[str]: ...
