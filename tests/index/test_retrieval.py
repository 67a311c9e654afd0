"""Retrieval: nearest first, each chunk once, always of the present state of the collection."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from index import (
    Catalogue,
    ChunkingConfig,
    CollectionMismatch,
    CollectionNotFound,
    DataDir,
    InvalidValue,
    Retriever,
    ingest,
)


@pytest.fixture
def retriever(catalogue, data_dir, embedder) -> Retriever:
    return Retriever(catalogue, data_dir, embedder)


def found(retriever: Retriever, question: str, top_k: int = 3, **options) -> list[str]:
    return [hit.chunk.text for hit in retriever.search("c", question, top_k, **options)]


def test_the_nearest_chunk_comes_first_with_its_source(retriever, add):
    add("birds", "the penguin swims", "the eagle flies")
    add("rocks", "granite is hard")
    hits = retriever.search("c", "penguin swims", 2)
    assert hits[0].chunk.text == "the penguin swims"
    assert hits[0].source == "birds.txt" and hits[0].chunk.ordinal == 0
    assert 1 >= hits[0].score > hits[1].score >= -1


def test_a_chunk_that_many_documents_share_is_found_once_and_leaves_room_for_others(retriever, add):
    for i in range(20):
        add(f"copy{i}", "the penguin swims")
    add("other", "the penguin walks")
    add("third", "granite is hard")
    assert found(retriever, "penguin swims", 3) == ["the penguin swims", "the penguin walks", "granite is hard"]
    assert len(found(retriever, "penguin swims", 50)) == 3


def test_a_threshold_leaves_out_what_is_farther(retriever, add):
    add("d", "the penguin swims", "granite is hard")
    assert found(retriever, "the penguin swims", score_threshold=0.99) == ["the penguin swims"]
    assert found(retriever, "the penguin swims", score_threshold=1.1) == []


def test_every_change_is_seen_by_the_next_question(retriever, add, catalogue):
    assert found(retriever, "penguin") == []
    add("d", "penguin one")
    assert found(retriever, "penguin") == ["penguin one"]
    for i in range(20):
        add(f"e{i}", f"filler {i}")
    add("d", "penguin two")
    assert found(retriever, "penguin", 1) == ["penguin two"]
    catalogue.delete_document("c", "d")
    assert "penguin two" not in found(retriever, "penguin", 50)


def test_a_collection_deleted_and_made_anew_is_searched_anew(retriever, add, catalogue):
    add("d", "old penguin")
    retriever.refresh("c")
    catalogue.delete_collection("c")
    with pytest.raises(CollectionNotFound):
        found(retriever, "penguin")
    catalogue.open_collection("c", "words-1", "hashing-1", 64)
    add("d", "new penguin")
    assert found(retriever, "penguin") == ["new penguin"]


def test_a_change_by_another_connection_is_seen(retriever, add, data_dir):
    add("d", "penguin")
    retriever.refresh("c")
    with Catalogue(data_dir.catalogue) as other:
        other.delete_document("c", "d")
    assert found(retriever, "penguin") == []


def test_threads_search_while_the_collection_changes(retriever, add):
    add("d", "the penguin swims")

    def work(i: int) -> bool:
        if i % 4 == 0:
            add(f"e{i}", f"filler number {i}")
        return found(retriever, "the penguin swims", 1) == ["the penguin swims"]

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(work, range(60)))


@pytest.mark.parametrize(("question", "top_k", "name"), [(" ", 3, "question"), ("x", 0, "top_k"), ("x", -1, "top_k")])
def test_a_search_for_nothing_is_refused_by_the_name_of_the_argument(retriever, question, top_k, name):
    with pytest.raises(InvalidValue, match=name):
        retriever.search("c", question, top_k)


def test_a_collection_of_another_embedding_model_is_refused(retriever, catalogue):
    catalogue.open_collection("other", "words-1", "another-model", 64)
    with pytest.raises(CollectionMismatch, match=r"another-model.*hashing-1"):
        retriever.search("other", "x", 1)


def test_with_the_real_model_the_end_of_a_long_passage_is_found(tmp_path, word_encoder, minilm):
    """The fact stands behind the model's window: cut off, the passage would be about the town hall alone."""
    hall = "The committee met in the afternoon and talked about the budget of the town hall. " * 25
    (tmp_path / "long.txt").write_text(hall + "Emperor penguins breed on the Antarctic ice in winter. " * 6)
    (tmp_path / "hall.txt").write_text(hall)
    (tmp_path / "desert.txt").write_text("Camels cross the Sahara desert in caravans and carry salt. " * 6)
    data_dir = DataDir(tmp_path / "data")
    with Catalogue(data_dir.catalogue) as catalogue:
        report = ingest([tmp_path], "c", catalogue, word_encoder, minilm, ChunkingConfig(4096))
        assert (report.num_added, report.num_chunks) == (3, 3)
        hits = Retriever(catalogue, data_dir, minilm).search("c", "Where do penguins breed?", 1)
    assert hits[0].source.endswith("long.txt")


def test_real_questions_find_their_passage_and_fast(tmp_path, shared_data, word_encoder, minilm):
    import json

    records = json.loads((shared_data / "wiki_passages.json").read_text())[:40]
    (tmp_path / "wiki.jsonl").write_text("\n".join(json.dumps(r) for r in records))
    data_dir = DataDir(tmp_path / "data")
    with Catalogue(data_dir.catalogue) as catalogue:
        ingest([tmp_path / "wiki.jsonl"], "c", catalogue, word_encoder, minilm)
        retriever = Retriever(catalogue, data_dir, minilm)
        retriever.refresh("c")
        start = time.perf_counter()
        hits = [retriever.search("c", f"What is known of {r['title']}?", 3) for r in records]
        elapsed = time.perf_counter() - start
    right = [r["title"] in [h.chunk.title for h in found] for r, found in zip(records, hits, strict=True)]
    assert sum(right) / len(right) > 0.9
    assert elapsed / len(records) < 1.0
