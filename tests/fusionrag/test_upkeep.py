"""Stored KV follows the collections: the new is computed, what lost a neighbour is refreshed, what left is removed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fusionrag.config import PreprocessConfig
from fusionrag.types import PromptChunk
from fusionrag.upkeep import Upkeep
from index import Catalogue, DataDir, Document, Ingestor, Section
from index.config import VectorIndexConfig
from tests.letters import LetterEmbedder

TEXTS = {name: f"{name} {name[0] * 5} {name}" for name in ("ants", "bees", "cats", "dogs", "eels", "foxes")}


@pytest.fixture
def data_dir(tmp_path):
    return DataDir(tmp_path)


@pytest.fixture
def catalogue(data_dir):
    with Catalogue(data_dir.catalogue) as catalogue:
        yield catalogue


@pytest.fixture
def add(bench, catalogue):
    def add(*names: str, collection: str = "c") -> None:
        documents = [Document(n, n.title(), (Section("", TEXTS[n]),), n) for n in names]
        Ingestor(catalogue, bench.prompts, LetterEmbedder()).add_documents(documents, collection)

    return add


@pytest.fixture(params=["all", "each"])
def fuse_behind(request):
    return request.param


@pytest.fixture
def make_upkeep(bench, catalogue, data_dir, fuse_behind):
    def make(engine=None, num_related: int = 2) -> Upkeep:
        config = PreprocessConfig(num_related=num_related, near_duplicate=1.0, fuse_behind=fuse_behind)
        prompts = bench.prompts
        return Upkeep(
            engine or bench.engine(),
            catalogue,
            data_dir,
            prompts.prefix_ids,
            prompts.fingerprint,
            config,
            VectorIndexConfig(),
        )

    return make


def finish(upkeep: Upkeep) -> int:
    upkeep._next_look = 0.0
    num_steps = 0
    while upkeep.step():
        num_steps += 1
        upkeep._next_look = 0.0
        assert num_steps < 1000
    return num_steps


def chunk_of(catalogue, name, collection="c", fused_behind="all"):
    (found,) = [s.chunk for s in catalogue.chunks(collection) if s.chunk.document_id == name]
    related = catalogue.related(collection, [found.chunk_id]).get(found.chunk_id)
    return PromptChunk(found.chunk_id, found.token_ids, related, fused_behind)


def is_complete(bench, catalogue, name, fused_behind="all") -> bool:
    chunk = chunk_of(catalogue, name, fused_behind=fused_behind)
    specs = [bench.spec(replace(chunk, related=context), "fused") for context in chunk.contexts]
    return bool(specs) and all(bench.store.contains(spec) for spec in [bench.spec(chunk, "raw"), *specs])


def num_contexts(catalogue, fused_behind) -> int:
    found = [chunk_of(catalogue, s.chunk.document_id, fused_behind=fused_behind) for s in catalogue.chunks("c")]
    return sum(len(chunk.contexts) for chunk in found)


def test_everything_that_is_added_gets_its_kv_and_then_there_is_nothing_to_do(
    bench, catalogue, add, make_upkeep, fuse_behind
):
    add("ants", "bees", "cats")
    upkeep = make_upkeep()
    assert finish(upkeep) >= 6  # a pass an object
    assert all(is_complete(bench, catalogue, name, fuse_behind) for name in ("ants", "bees", "cats"))
    counts = catalogue.counts("c")
    assert (counts.num_raw, counts.num_fused, counts.num_stale) == (3, num_contexts(catalogue, fuse_behind), 0)
    assert finish(upkeep) == 0
    add("dogs")
    assert finish(upkeep) >= 2
    assert is_complete(bench, catalogue, "dogs", fuse_behind)
    assert catalogue.counts("c").num_fused == num_contexts(catalogue, fuse_behind)


def test_a_restart_computes_nothing_again(bench, catalogue, add, make_upkeep):
    add("ants", "bees", "cats")
    finish(make_upkeep())
    written = bench.store.stats.bytes_written
    finish(make_upkeep())
    assert bench.store.stats.bytes_written == written


def test_what_lost_a_neighbour_is_refreshed_and_what_left_is_removed(bench, catalogue, add, make_upkeep, fuse_behind):
    add("ants", "bees", "cats", "dogs")
    upkeep = make_upkeep()
    finish(upkeep)
    gone = chunk_of(catalogue, "dogs")
    saw_it = [n for n in ("ants", "bees", "cats") if gone.chunk_id in chunk_of(catalogue, n).related]
    assert saw_it
    catalogue.delete_document("c", "dogs")
    assert catalogue.counts("c").num_stale == len(saw_it)
    finish(upkeep)
    counts = catalogue.counts("c")
    assert (counts.num_raw, counts.num_fused, counts.num_stale) == (3, num_contexts(catalogue, fuse_behind), 0)
    assert all(is_complete(bench, catalogue, name, fuse_behind) for name in ("ants", "bees", "cats"))
    assert not bench.store.contains(bench.spec(gone, "raw")) and not bench.store.contains(bench.spec(gone, "fused"))
    finish(upkeep)
    assert set(bench.store.digests()) == {o.digest for o in catalogue.kv_objects("c")}
    assert catalogue.kv_garbage() == []


def test_the_last_chunk_left_has_no_stale_kv(bench, catalogue, add, make_upkeep):
    add("ants", "bees")
    upkeep = make_upkeep()
    finish(upkeep)
    catalogue.delete_document("c", "bees")
    finish(upkeep)
    finish(upkeep)
    assert [o.kind for o in catalogue.kv_objects("c")] == ["raw"]
    assert len(list(bench.store.digests())) == 1


def test_collections_of_different_owners_share_no_object(bench, catalogue, add, make_upkeep):
    add("ants", "bees")
    add("ants", "bees", collection="d")
    with catalogue._database.write() as connection:
        connection.execute("UPDATE collections SET owner = 'somebody' WHERE name = 'd'")
    finish(make_upkeep())
    digests = [{o.digest for o in catalogue.kv_objects(name)} for name in ("c", "d")]
    assert len(digests[0]) == len(digests[1]) == 4 and not digests[0] & digests[1]


def test_a_full_arena_puts_the_work_off_and_loses_nothing(bench, catalogue, add, make_upkeep, fuse_behind):
    add("ants", "bees", "cats")
    engine = bench.engine()
    upkeep = make_upkeep(engine)
    span = engine.arena.allocate(engine.arena.num_free)
    finish(upkeep)
    assert catalogue.counts("c").num_raw == 0
    engine.arena.free(span)
    finish(upkeep)
    assert all(is_complete(bench, catalogue, name, fuse_behind) for name in ("ants", "bees", "cats"))
    assert engine.arena.num_free == engine.arena.num_slots


def test_a_collection_deleted_under_way_ends_the_work_on_it(bench, catalogue, add, make_upkeep):
    add("ants", "bees", "cats")
    upkeep = make_upkeep()
    for _ in range(3):
        assert upkeep.step()
    catalogue.delete_collection("c")
    finish(upkeep)
    assert list(bench.store.digests()) == catalogue.kv_garbage() == []


def test_without_related_chunks_only_raw_kv_is_computed(bench, catalogue, add, make_upkeep):
    add("ants", "bees")
    finish(make_upkeep(num_related=0))
    assert {o.kind for o in catalogue.kv_objects("c")} == {"raw"}
