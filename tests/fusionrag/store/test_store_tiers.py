"""Host memory, the tiers together, and what every KVStore promises."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusionrag.config import StoreConfig
from fusionrag.store import DiskStore, HostTier, KVStore, MemoryStore, TieredStore, open_store
from fusionrag.store.codec import CODECS
from fusionrag.store.pinned import PinnedMemory
from fusionrag.types import ChunkKV, KVSource


def encoded_tier(folder, capacity_bytes: int) -> TieredStore:
    """As `open_store` makes it for a GPU, but that no page is locked: that takes one."""
    pinned = PinnedMemory(capacity_bytes, slab_bytes=1 << 16, pin=False)
    return TieredStore(DiskStore(folder), HostTier(capacity_bytes), pinned)


@pytest.fixture(params=["memory", "disk", "tiered", "tiered, no host memory", "tiered, for a GPU"])
def store(request, tmp_path) -> KVStore:
    if request.param == "memory":
        return MemoryStore()
    if request.param == "disk":
        return DiskStore(tmp_path)
    if "GPU" in request.param:
        return encoded_tier(tmp_path, 1 << 20)
    return open_store(tmp_path, StoreConfig(host_tier_bytes=0 if "no host" in request.param else 1 << 20))


def test_every_store_gives_back_what_was_put_and_nothing_else(store, make_spec, make_kv):
    spec, other = make_spec(), make_spec(first_id=200)
    assert store.get(spec) is None and not store.contains(spec)
    store.put(spec, make_kv(spec))
    store.put(spec, make_kv(spec))
    hit = store.get(spec)
    assert hit.kv.keys.equal(make_kv(spec).keys) and hit.kv.values.equal(make_kv(spec).values)
    assert store.contains(spec) and not store.contains(other)
    assert store.get(other) is None


def test_every_store_lists_its_digests_in_ascending_order_and_forgets_the_deleted(store, make_spec, make_kv):
    specs = [make_spec(first_id=first_id) for first_id in range(8)]
    for spec in specs:
        store.put(spec, make_kv(spec))
    assert list(store.digests()) == sorted(spec.digest for spec in specs)
    hit = store.get(specs[3])
    assert store.delete(specs[3].digest) >= hit.kv.num_bytes
    assert store.delete(specs[3].digest) == 0
    assert specs[3].digest not in list(store.digests()) and store.get(specs[3]) is None
    assert hit.kv.keys.equal(make_kv(specs[3]).keys)  # what was handed out stays


def test_every_store_counts_each_get_once(store, make_spec, make_kv):
    specs = [make_spec(first_id=first_id) for first_id in range(4)]
    for spec in specs[:2]:
        store.put(spec, make_kv(spec))
    for _ in range(3):
        for spec in specs:
            store.get(spec)
    stats = store.stats
    assert stats.hits_host + stats.hits_disk == 6 and stats.misses == 6


def test_every_store_is_deaf_to_later_changes_of_what_was_put(store, make_spec, make_kv):
    spec = make_spec()
    kv = make_kv(spec)
    store.put(spec, kv)
    kv.keys.zero_()
    assert store.get(spec).kv.keys.equal(make_kv(spec).keys)


@pytest.mark.parametrize("codec", CODECS)
def test_every_tier_gives_the_same_bytes_whatever_the_codec(codec, tmp_path, make_spec, make_kv):
    spec = make_spec(num_tokens=7, codec=codec)
    memory, tiered = MemoryStore(), open_store(tmp_path, StoreConfig())
    memory.put(spec, make_kv(spec))
    tiered.put(spec, make_kv(spec))
    hits = [memory.get(spec), tiered.get(spec), DiskStore(tmp_path).get(spec)]
    assert [hit.source for hit in hits] == [KVSource.HOST, KVSource.HOST, KVSource.DISK]
    for hit in hits[1:]:
        assert hit.kv.keys.equal(hits[0].kv.keys) and hit.kv.values.equal(hits[0].kv.values)


def test_a_read_from_disk_is_promoted_to_host_memory(tmp_path, make_spec, make_kv):
    spec = make_spec()
    DiskStore(tmp_path).put(spec, make_kv(spec))
    store = open_store(tmp_path, StoreConfig())
    first, second = store.get(spec), store.get(spec)
    assert (first.source, second.source) == (KVSource.DISK, KVSource.HOST)
    assert second.kv is first.kv
    assert (store.stats.hits_disk, store.stats.hits_host) == (1, 1)


def test_the_object_least_used_falls_back_to_disk(tmp_path, make_spec, make_kv):
    specs = [make_spec(first_id=first_id) for first_id in range(3)]
    num_bytes = make_kv(specs[0]).num_bytes
    store = TieredStore(DiskStore(tmp_path), HostTier(2 * num_bytes))
    store.put(specs[0], make_kv(specs[0]))
    store.put(specs[1], make_kv(specs[1]))
    store.get(specs[0])
    store.put(specs[2], make_kv(specs[2]))
    assert [store.get(spec).source for spec in (specs[0], specs[2], specs[1])] == [
        KVSource.HOST,
        KVSource.HOST,
        KVSource.DISK,
    ]


@pytest.mark.parametrize("codec", CODECS)
def test_for_a_gpu_host_memory_holds_the_codecs_bytes_and_nothing_decoded(codec, tmp_path, make_spec, make_kv):
    spec = make_spec(num_tokens=64, codec=codec)
    for _ in range(2):  # put, then read from disk
        store = encoded_tier(tmp_path, 1 << 20)
        if not list(store.digests()):
            store.put(spec, make_kv(spec))
        payloads = [store.get(spec).payload for _ in range(3)]
        assert payloads[1] is payloads[2] and payloads[1].codec == codec
        assert store.get(spec).kv.keys.equal(DiskStore(tmp_path).get(spec).kv.keys)
        decoded = vars(payloads[1]).get("kv")
        assert decoded is None or decoded.keys.data_ptr() == payloads[1].tensors["kv"].data_ptr(), "a view, or nothing"


def test_for_a_gpu_objects_that_were_let_go_make_room_in_page_locked_memory(tmp_path, make_spec, make_kv):
    specs = [make_spec(num_tokens=64, first_id=100 * i) for i in range(40)]
    store = encoded_tier(tmp_path, 1 << 16)
    for spec in specs:
        store.put(spec, make_kv(spec))
    hits = [store.recall(spec) for spec in specs]
    held = [hit.payload for hit in hits if hit is not None]
    assert 2 <= len(held) == sum(hit is not None for hit in hits[-len(held) :]), "the last ones"
    starts = sorted(payload.tensors["kv"].data_ptr() for payload in held)
    assert starts[-1] - starts[0] < 1 << 16, "all of them in the one slab"


def test_open_store_passes_verify_checksum_on(tmp_path, make_spec, make_kv):
    spec = make_spec()
    DiskStore(tmp_path).put(spec, make_kv(spec))
    path = next(tmp_path.glob("objects/*/*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 4
    path.write_bytes(data)
    assert open_store(tmp_path, StoreConfig(verify_checksum=False)).get(spec) is not None
    assert open_store(tmp_path, StoreConfig()).get(spec) is None


def some_kv(num_tokens=1):
    return ChunkKV(*torch.zeros(2, 1, 1, num_tokens, 1))


TOKEN_BYTES = some_kv().num_bytes


@settings(max_examples=100, deadline=None)
@given(
    capacity_kv=st.integers(0, 6),
    steps=st.lists(
        st.tuples(st.sampled_from(["add", "get", "discard"]), st.integers(0, 7), st.integers(1, 4)), max_size=60
    ),
)
def test_host_tier_holds_what_it_was_given_and_never_exceeds_its_bytes(capacity_kv, steps):
    tier: HostTier[ChunkKV] = HostTier(capacity_kv * TOKEN_BYTES)
    given_kv: dict[str, ChunkKV] = {}  # what may be there, and would be if nothing were ever let go
    for action, number, num_tokens in steps:
        digest = str(number)
        if action == "add":
            was_there = tier.get(digest) is not None
            kv = some_kv(num_tokens)
            tier.add(digest, kv)
            if not was_there:
                given_kv[digest] = kv
                assert (tier.get(digest) is kv) == (num_tokens <= capacity_kv)
        elif action == "get":
            found = tier.get(digest)
            assert found is None or found is given_kv[digest]
        else:
            tier.discard(digest)
            assert tier.get(digest) is None
        held = [kv for kv in (tier.get(d) for d in given_kv) if kv is not None]
        assert len(tier) == len(held) and tier.num_bytes == sum(kv.num_bytes for kv in held) <= tier.capacity_bytes


@given(st.permutations(range(6)))
def test_of_objects_alike_in_size_and_use_the_least_recently_used_leaves(order):
    tier: HostTier[ChunkKV] = HostTier(6 * TOKEN_BYTES)
    for number in range(6):
        tier.add(str(number), some_kv())
    for number in order:
        tier.get(str(number))
    assert tier.evict() and tier.get(str(order[0])) is None
    assert all(tier.get(str(number)) is not None for number in order[1:])


def test_what_is_used_often_outlives_a_pass_over_many_that_are_used_once():
    tier: HostTier[ChunkKV] = HostTier(4 * TOKEN_BYTES)
    tier.add("hot", some_kv())
    for _ in range(3):
        tier.get("hot")
    for number in range(6):
        tier.add(str(number), some_kv())
    assert tier.get("hot") is not None


def test_what_was_used_often_long_ago_leaves_in_the_end():
    tier: HostTier[ChunkKV] = HostTier(4 * TOKEN_BYTES)
    tier.add("hot", some_kv())
    for _ in range(3):
        tier.get("hot")
    for number in range(100):
        tier.add(str(number), some_kv())
    assert tier.get("hot") is None and tier.get("99") is not None


def test_of_two_used_alike_the_one_that_is_cheaper_to_read_again_byte_for_byte_leaves():
    tier: HostTier[ChunkKV] = HostTier(5 * TOKEN_BYTES)
    tier.add("small", some_kv(1))
    tier.add("large", some_kv(4))
    tier.add("next", some_kv(1))
    assert tier.get("small") is not None and tier.get("large") is None


def test_kv_that_a_request_holds_survives_its_eviction(make_spec, make_kv):
    specs = [make_spec(first_id=first_id) for first_id in range(2)]
    tier = HostTier(make_kv(specs[0]).num_bytes)
    tier.add("first", make_kv(specs[0]))
    held = tier.get("first")
    tier.add("second", make_kv(specs[1]))
    assert tier.get("first") is None
    assert held.keys.equal(make_kv(specs[0]).keys)


def test_an_object_larger_than_the_tier_passes_through_and_evicts_nothing(make_spec, make_kv):
    small, large = make_spec(num_tokens=2), make_spec(num_tokens=9)
    tier = HostTier(make_kv(small).num_bytes)
    tier.add("small", make_kv(small))
    tier.add("large", make_kv(large))
    assert tier.get("large") is None and tier.get("small") is not None


def test_threads_that_put_get_and_delete_at_once_see_whole_objects_only(tmp_path, make_spec, make_kv):
    specs = [make_spec(num_tokens=16, first_id=first_id) for first_id in range(6)]
    expected = {spec.digest: make_kv(spec) for spec in specs}
    store = TieredStore(DiskStore(tmp_path), HostTier(2 * expected[specs[0].digest].num_bytes))
    num_threads, num_rounds = 4, 25
    start = threading.Barrier(num_threads)

    def work(thread: int) -> int:
        start.wait()
        num_hits = 0
        for i in range(num_rounds):
            spec = specs[(i + thread) % len(specs)]
            store.put(spec, expected[spec.digest])
            hit = store.get(spec)
            if hit is not None:  # another thread may have deleted it
                num_hits += 1
                assert hit.kv.keys.equal(expected[spec.digest].keys)
                assert hit.kv.values.equal(expected[spec.digest].values)
            if i % 5 == thread:
                store.delete(spec.digest)
        return num_hits

    with ThreadPoolExecutor(num_threads) as pool:
        num_hits = sum(pool.map(work, range(num_threads)))
    stats = store.stats
    assert num_hits > 0 and stats.hits_host + stats.hits_disk == num_hits
    assert num_hits + stats.misses == num_threads * num_rounds
    assert stats.quarantined == 0
    assert not [name for _, _, names in os.walk(tmp_path) for name in names if name.endswith(".tmp")]
