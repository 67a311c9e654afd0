"""The offline job: computes what is missing and nothing else, wherever it was stopped and however it is shared out."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from fusionrag.config import StoreConfig
from fusionrag.errors import ArenaFull, PromptTooLong
from fusionrag.layout import compute_prefix
from fusionrag.preprocess.passes import ChunkJob, compute_chunks
from fusionrag.stitch import CaptureKV, place_
from fusionrag.store import MemoryStore, open_store
from fusionrag.types import RowGroup

LENGTHS = (23, 40, 17, 31, 12, 28, 35)


class CountingStore(MemoryStore):
    def __init__(self):
        super().__init__()
        self.puts = Counter()

    def put(self, spec, kv):
        self.puts[spec.digest] += 1
        super().put(spec, kv)


@pytest.fixture
def store():
    return CountingStore()


@pytest.fixture
def corpus(bench):
    return bench.with_neighbours(bench.chunks(*LENGTHS), num_related=2)


@pytest.fixture
def whole(bench, corpus):
    """The store of a job that was never stopped."""
    bench.preprocess(corpus)
    return bench.store


def specs(bench, chunks):
    return [bench.spec(c, kind) for kind in ("raw", "fused") for c in chunks if kind == "raw" or c.related]


def assert_same(bench, chunks, store, expected, atol=1e-5):
    """Batches are cut elsewhere, so values may differ by rounding."""
    assert set(store.digests()) == set(expected.digests()) == {s.digest for s in specs(bench, chunks)}
    for spec in specs(bench, chunks):
        ours, theirs = store.get(spec).kv, expected.get(spec).kv
        torch.testing.assert_close(ours.keys, theirs.keys, rtol=0, atol=atol)
        torch.testing.assert_close(ours.values, theirs.values, rtol=0, atol=atol)


def assert_close_kv(ours, theirs, atol=1e-5):
    torch.testing.assert_close((ours.keys, ours.values), (theirs.keys, theirs.values), rtol=0, atol=atol)


# --- what is computed -------------------------------------------------------------------------------------------------


def test_raw_kv_is_the_chunk_forwarded_right_behind_the_prefix(family, make_bench):
    bench = make_bench(family)
    chunks = bench.chunks(23, 31, 40)
    bench.preprocess(chunks)
    prefix_ids = bench.prompts.prefix_ids
    for chunk in chunks:
        capture, arena = CaptureKV(), bench.model.new_arena(100)
        ids, positions = bench.model.rows([*prefix_ids, *chunk.token_ids])
        bench.model.forward([RowGroup(arena.allocate(len(ids)), ids, positions, observer=capture)], arena)
        stored, by_hand = bench.store.get(bench.spec(chunk)).kv, capture.chunk_kv()
        torch.testing.assert_close(stored.keys, by_hand.keys[:, :, len(prefix_ids) :], rtol=0, atol=1e-4)
        torch.testing.assert_close(stored.values, by_hand.values[:, :, len(prefix_ids) :], rtol=0, atol=1e-4)


def test_fused_kv_is_the_chunk_forwarded_behind_its_related_chunks_raw_kv(family, make_bench):
    bench = make_bench(family)
    model = bench.model
    a, b, c = bench.chunks(23, 31, 40)
    c = bench.behind(c, [b, a])  # in this order
    bench.preprocess([a, b, c])
    arena = model.new_arena(300)
    span, at = arena.allocate(200), 0
    raw = [bench.store.get(bench.spec(chunk)).kv for chunk in (b, a)]
    for kv in (compute_prefix(model, bench.prompts.prefix_ids), *raw):
        place_(arena, model.rope, span, at, kv)
        at += kv.num_tokens
    capture = CaptureKV()
    model.forward([RowGroup(span, *model.rows(c.token_ids, at), observer=capture)], arena)
    fused = bench.store.get(bench.spec(c, "fused")).kv
    assert_close_kv(fused, capture.chunk_kv())
    assert (fused.values - bench.store.get(bench.spec(c)).kv.values).abs().max() > 0.1  # what raw does not know


def test_chunks_of_one_batch_do_not_see_each_other(bench, corpus, whole):
    alone = MemoryStore()
    for _ in bench.job(corpus, alone, max_batch_tokens=16).run(corpus):  # smaller than any two chunks
        pass
    assert_same(bench, corpus, whole, alone)


def test_every_object_is_reported_once_and_raw_before_fused(bench, corpus, store):
    items = list(bench.job(corpus, store).run(corpus))
    assert [item.spec for item in items] == specs(bench, corpus)
    assert all(item.computed and item.spec.chunk_ids == item.chunk.token_ids for item in items)
    assert all(item.num_bytes == store.get(item.spec).kv.num_bytes for item in items)
    bytes_per_token = bench.model.shape.kv_bytes_per_token(torch.float32)
    assert [item.num_bytes for item in items] == [bytes_per_token * len(item.spec.chunk_ids) for item in items]


def test_an_item_is_in_the_store_when_it_is_reported(bench, corpus, store):
    for item in bench.job(corpus, store).run(corpus):
        assert store.contains(item.spec)


@pytest.mark.parametrize("related", [None, ()])
def test_chunks_without_related_chunks_get_raw_kv_alone(related, bench, store):
    chunks = [bench.behind(c, related) for c in bench.chunks(*LENGTHS)]
    kinds = [item.spec.kind for item in bench.job(chunks, store).run(chunks)]
    assert kinds == ["raw"] * len(chunks)


# --- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_items", [0, 1, 3, 6, 7, 9, 13, 14])
@pytest.mark.parametrize("max_batch_tokens", [16, 64, 1024])
def test_a_job_stopped_anywhere_and_started_again_computes_nothing_twice(
    num_items, max_batch_tokens, bench, corpus, store, whole
):
    run = bench.job(corpus, store, max_batch_tokens=max_batch_tokens).run(corpus)
    first = [next(run) for _ in range(num_items)]
    run.close()
    second = list(bench.job(corpus, store, max_batch_tokens=max_batch_tokens).run(corpus))
    assert sorted(item.spec.digest for item in second if not item.computed) == sorted(i.spec.digest for i in first)
    assert set(store.puts.values()) == {1} and len(store.puts) == 2 * len(LENGTHS)
    assert_same(bench, corpus, store, whole)


def test_a_job_stopped_at_every_item_gets_there(bench, corpus, store, whole):
    for _ in range(2 * len(LENGTHS)):
        run = bench.job(corpus, store, max_batch_tokens=64).run(corpus)
        while not next(run).computed:
            pass
        run.close()
    assert set(store.puts.values()) == {1}
    assert_same(bench, corpus, store, whole)


def test_a_finished_job_computes_nothing_and_says_so(bench, corpus, store):
    list(bench.job(corpus, store).run(corpus))
    again = list(bench.job(corpus, store).run(corpus))
    assert [item.spec for item in again] == specs(bench, corpus)
    assert not any(item.computed for item in again)
    assert all(item.num_bytes == store.get(item.spec).kv.num_bytes for item in again)
    assert set(store.puts.values()) == {1}


def test_new_related_chunks_are_new_fused_kv_and_old_raw_kv(bench, corpus, store):
    list(bench.job(corpus, store).run(corpus))
    changed = bench.with_neighbours(corpus, num_related=1)
    computed = [item.spec.kind for item in bench.job(changed, store).run(changed) if item.computed]
    assert computed == ["fused"] * len(corpus)


# --- sharing out ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_shards", [2, 3])
def test_shards_together_are_the_whole(num_shards, bench, corpus, store, whole):
    """A shard needs raw KV of chunks of another's; it computes what is not there yet, and reports that too."""
    for shard in range(num_shards):
        mine = corpus[shard::num_shards]
        items = list(bench.job(corpus, store).run(mine))
        needed = {c.chunk_id for c in mine} | {other for c in mine for other in c.related or ()}
        assert {item.chunk.chunk_id for item in items} == needed
    assert_same(bench, corpus, store, whole)
    assert set(store.puts.values()) == {1}  # one after the other, they never do the same work


def test_shards_side_by_side_are_the_whole(bench, corpus, store, whole):
    runs = [bench.job(corpus, store, max_batch_tokens=32).run(corpus[shard::2]) for shard in range(2)]
    while runs:
        runs = [run for run in runs if next(run, None) is not None]
    assert_same(bench, corpus, store, whole)


def test_a_bad_object_of_a_related_chunk_is_computed_again(bench, corpus, whole, tmp_path):
    store = open_store(tmp_path, StoreConfig(host_tier_bytes=0))
    list(bench.job(corpus, store).run(corpus))
    bad, fused = bench.spec(corpus[1]), bench.spec(corpus[0], "fused")  # the second stands in front of the first
    (path,) = tmp_path.rglob(f"*{bad.digest}*")
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    store.delete(fused.digest)
    computed = [item.spec for item in bench.job(corpus, store).run(corpus) if item.computed]
    assert computed == [fused] and store.stats.quarantined == 1
    for spec in (bad, fused):
        assert_close_kv(store.get(spec).kv, whole.get(spec).kv)


# --- limits -----------------------------------------------------------------------------------------------------------


def test_a_chunk_that_does_not_fit_behind_its_related_chunks_is_refused_with_the_remedy(make_bench):
    bench = make_bench(max_position_embeddings=100)
    a, b, c = bench.chunks(40, 35, 30)
    c = bench.behind(c, [a, b])
    with pytest.raises(PromptTooLong, match=rf"{c.chunk_id} with 2 related chunks needs 119 .* lower num_related") as e:
        list(bench.job([a, b, c]).run([a, b, c]))
    assert e.value.field == "num_related"
    c = bench.behind(c, [a])
    bench.preprocess([a, b, c])
    assert bench.store.contains(bench.spec(c, "fused"))


@pytest.fixture
def num_largest(bench, corpus):
    """Positions of the largest chunk behind its related chunks."""
    lengths = {c.chunk_id: len(c.token_ids) for c in corpus}
    largest = max(lengths[c.chunk_id] + sum(lengths[r] for r in c.related) for c in corpus)
    return len(bench.prompts.prefix_ids) + largest


@pytest.mark.parametrize("num_spare", [0, 40, 300])
@pytest.mark.parametrize("max_batch_tokens", [16, 60, 1024])
def test_batches_fit_the_arena_and_the_pass(num_spare, max_batch_tokens, bench, corpus, whole, store, num_largest):
    job = bench.job(corpus, store, arena_tokens=num_largest + num_spare, max_batch_tokens=max_batch_tokens)
    list(job.run(corpus))
    assert_same(bench, corpus, store, whole)


def test_an_arena_too_small_for_one_chunk_is_refused(bench, corpus, num_largest):
    with pytest.raises(PromptTooLong, match=f"needs {num_largest} positions, the model has {num_largest - 1}"):
        list(bench.job(corpus, arena_tokens=num_largest - 1).run(corpus))


def test_jobs_that_do_not_fit_leave_the_arena_as_it_was(bench):
    prefix, arena = compute_prefix(bench.model, bench.prompts.prefix_ids), bench.model.new_arena(100)
    jobs = [ChunkJob(c.token_ids) for c in bench.chunks(40, 40)]
    with pytest.raises(ArenaFull, match="2 chunks with their context do not fit"):
        compute_chunks(bench.model, arena, prefix, jobs)
    assert arena.num_free == 100
    assert len(compute_chunks(bench.model, arena, prefix, jobs[:1])) == 1
    assert arena.num_free == 100
