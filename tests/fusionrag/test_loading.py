"""Finding stored KV and bringing it into spans: in order, several files at a time, and from where it was said to be."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from fusionrag.config import StoreConfig
from fusionrag.loading import CpuLoader, GpuLoader, LayerArrival, Piece, layer_runs, make_loader
from fusionrag.store import DiskStore, MemoryStore, open_store
from fusionrag.store.codec import EncodedKV
from fusionrag.types import KVSource


class ColdStore(MemoryStore):
    """Everything has to be read, and a read ends only when `num_together` reads are going on."""

    def __init__(self, num_together: int = 1) -> None:
        super().__init__()
        self._together = threading.Barrier(num_together)

    def recall(self, spec):
        return None

    def get(self, spec):
        self._together.wait(20)
        return super().recall(spec)


@pytest.fixture
def chunks(bench):
    return bench.chunks(5, 9, 4, 7)


def put(bench, store, chunks, kind="raw"):
    for chunk in chunks:
        store.put(bench.spec(chunk, kind), bench.garbage(chunk, seed=int(chunk.chunk_id[:6], 16)))


def test_what_is_found_comes_in_the_order_that_was_asked_for(bench, chunks, tmp_path):
    put(bench, DiskStore(tmp_path), chunks[:3])
    store = open_store(tmp_path, StoreConfig())
    store.get(bench.spec(chunks[1]))  # now in host memory
    found = list(CpuLoader(bench.model, store).find([(bench.spec(c),) for c in chunks]))
    assert [f and f.spec for f in found] == [*(bench.spec(c) for c in chunks[:3]), None]
    assert [f.source for f in found[:3]] == [KVSource.DISK, KVSource.HOST, KVSource.DISK]


def test_files_are_read_several_at_a_time(bench, chunks):
    """The reads of this store end only together."""
    store = ColdStore(num_together=len(chunks))
    put(bench, store, chunks)
    found = list(CpuLoader(bench.model, store).find([(bench.spec(c),) for c in chunks]))
    assert [f.spec for f in found] == [bench.spec(c) for c in chunks]


def test_reading_begins_before_the_first_chunk_is_taken(bench, chunks):
    store = ColdStore(num_together=len(chunks) + 1)
    put(bench, store, chunks)
    finding = CpuLoader(bench.model, store).find([(bench.spec(c),) for c in chunks])
    taken = threading.Thread(target=next, args=(finding,))
    taken.start()
    store._together.wait(20)  # all reads, and this
    taken.join(20)
    assert not taken.is_alive()


@pytest.mark.parametrize("fused", [None, "disk", "host"])
@pytest.mark.parametrize("raw", [None, "disk", "host"])
def test_the_tier_that_is_told_is_the_one_that_is_found(fused, raw, bench, tmp_path):
    first, second = bench.chunks(6, 8)
    chunk = bench.behind(second, [first])
    specs = (bench.spec(chunk, "fused"), bench.spec(chunk))
    disk = DiskStore(tmp_path)
    for spec, where in zip(specs, (fused, raw), strict=True):
        if where:
            disk.put(spec, bench.garbage(chunk))
    store = open_store(tmp_path, StoreConfig())
    for spec, where in zip(specs, (fused, raw), strict=True):
        if where == "host":
            store.get(spec)
    loader = CpuLoader(bench.model, store)
    (told,) = loader.locate([specs])
    (found,) = loader.find([specs])
    assert told == (found and found.source)
    if found:
        assert found.spec is specs[0 if fused else 1]
        assert found.source.value == (fused or raw)


def test_asking_where_kv_lies_brings_none_of_it(bench, chunks, tmp_path):
    put(bench, DiskStore(tmp_path), chunks)
    store = open_store(tmp_path, StoreConfig())
    loader, candidates = CpuLoader(bench.model, store), [(bench.spec(c),) for c in chunks]
    for _ in range(2):
        assert loader.locate(candidates) == [KVSource.DISK] * len(chunks)
    assert store.stats.bytes_read == 0


def test_what_is_read_ahead_is_in_host_memory_later_and_nobody_waits_for_it(bench, chunks, tmp_path):
    put(bench, DiskStore(tmp_path), chunks[:3])
    store = open_store(tmp_path, StoreConfig())
    loader, candidates = CpuLoader(bench.model, store), [(bench.spec(c),) for c in chunks]
    for _ in range(3):
        loader.read_ahead(candidates)
    eventually(lambda: loader.locate(candidates) == [*[KVSource.HOST] * 3, None])
    eventually(lambda: not loader._being_read)
    assert store.stats.hits_disk == 3, "each once"


def test_reading_ahead_does_not_wait(bench, chunks):
    """The reads of this store end only when somebody comes to them."""
    store = ColdStore(num_together=len(chunks) + 1)
    put(bench, store, chunks)
    CpuLoader(bench.model, store).read_ahead([(bench.spec(c),) for c in chunks])
    store._together.wait(20)


def eventually(condition, timeout_s=20.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


def test_pieces_are_in_the_span_when_place_returns(bench, chunks):
    arena = bench.model.new_arena(64)
    span = arena.allocate(40)
    loader = make_loader(bench.model, bench.store, device_tier_bytes=0)
    kvs = [bench.garbage(c, seed=i) for i, c in enumerate(chunks)]
    starts = [3, 8, 17, 21]
    pieces = [Piece(start, EncodedKV.plain(kv)) for start, kv in zip(starts, kvs, strict=True)]
    assert loader.place_(arena, span, pieces, send=lambda: None) is None
    for start, kv in zip(starts, kvs, strict=True):
        slots = slice(span.start + start, span.start + start + kv.num_tokens)
        positions = torch.arange(start, start + kv.num_tokens)
        rope = bench.model.rope
        torch.testing.assert_close(arena.keys[:, :, slots], rope.rotate(kv.keys, *rope.tables(positions)))
        assert arena.values[:, :, slots].equal(kv.values)


@pytest.mark.parametrize("num_layers", [1, 2, 3, 4, 5, 21, 28, 32])
def test_runs_of_layers_follow_each_other_and_begin_with_a_single_one(num_layers):
    runs = layer_runs(num_layers)
    assert [layer for run in runs for layer in run] == list(range(num_layers))
    assert len(runs[0]) == 1 and all(runs)


def test_layers_are_placed_in_order_when_their_copies_are_queued_and_the_next_ones_too():
    queued = []
    arrival = LayerArrival(
        lambda layers: queued.append(("copy", layers.start, layers.stop)) or layers,
        lambda layers, copied: queued.append(("place", layers.start, layers.stop)) or copied == layers,
        10,
        None,
    )
    assert queued == [("copy", 0, 1), ("copy", 1, 3), ("place", 0, 1), ("copy", 3, 6), ("place", 1, 3)]
    arrival.wait(4)  # behind the first layer of its run: the run was waited for, and the next one's time has come
    assert queued[5:] == [("copy", 6, 9), ("place", 3, 6), ("copy", 9, 10), ("place", 6, 9)]
    arrival.queue_all()
    arrival.queue_all()
    assert queued[9:] == [("place", 9, 10)]
    assert all(arrival._placed)  # each waits for its own copies


def test_a_cpu_gets_the_loader_of_a_cpu(bench):
    assert isinstance(make_loader(bench.model, bench.store, 1 << 20), CpuLoader)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kv_that_was_used_stays_on_the_device_and_is_told_to_be_there(make_hf, make_config, tokenizer, bench, tmp_path):
    from fusionrag.model import LanguageModel

    model = LanguageModel(make_hf(make_config("llama"), "eager").to("cuda"), tokenizer, "tiny")
    chunks = bench.chunks(5, 9)
    store = open_store(tmp_path, StoreConfig(), for_gpu=True)
    put(bench, store, chunks)
    loader, candidates = GpuLoader(model, store, 1 << 20), [(bench.spec(c),) for c in chunks]
    arena = model.new_arena(64)
    span = arena.allocate(40)
    sent = []
    for source in (KVSource.HOST, KVSource.DEVICE):
        assert loader.locate(candidates) == [source] * 2
        found = list(loader.find(candidates))
        assert [f.source for f in found] == [source] * 2
        pieces = [Piece(p, f.payload, f.spec.digest) for p, f in zip((0, 5), found, strict=True)]
        loader.place_(arena, span, pieces, send=lambda: sent.append(torch.cuda.current_stream())).wait_for_all()
    assert len(sent) == 2 and torch.cuda.current_stream() not in sent  # on the stream of the copies
