"""Removing stored KV that nothing refers to any more.

Knows nothing about who made it garbage. Invariant: an object whose chunk is in a collection is never taken for an
orphan, booked or not: a job that was killed before it booked what it had stored finds it again.
"""

from __future__ import annotations

from fusionrag.store import KVStore
from fusionrag.store.tiered import TieredStore
from index import Catalogue
from index.types import chunk_id_of


def sweep(catalogue: Catalogue, store: KVStore) -> int:
    """Removes the files of all garbage; returns the bytes freed."""
    garbage = catalogue.kv_garbage()
    freed = sum(store.delete(digest) for digest in garbage)
    if garbage:
        catalogue.forget_kv(garbage)
    return freed


def discard_orphans(catalogue: Catalogue, store: TieredStore) -> int:
    """Makes garbage of objects that a process stored and died before it booked them, and whose chunk has left since.

    Returns how many. An object whose header cannot be read stays: whoever asks for it sets it aside.
    """
    chunk_id_of_object = {}
    for digest in catalogue.unbooked_kv(store.digests()):
        ids = (store.written_for(digest) or {}).get("chunk_ids")
        if isinstance(ids, list):
            chunk_id_of_object[digest] = chunk_id_of(ids)
    kept = catalogue.known_chunk_ids(chunk_id_of_object.values())
    orphans = [digest for digest, chunk_id in chunk_id_of_object.items() if chunk_id not in kept]
    if orphans:
        catalogue.discard_kv(orphans)
    return len(orphans)
