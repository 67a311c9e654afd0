"""Retrieval: best first, each chunk once, by meaning and by words, always of the present state of the collection."""

import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from index import (
    Catalogue,
    Chunk,
    ChunkingConfig,
    CollectionMismatch,
    CollectionNotFound,
    DataDir,
    Document,
    InvalidValue,
    Retriever,
    SearchConfig,
    Section,
    VectorIndexConfig,
    ingest,
)
from index.filters import Comparison
from index.fusion import fuse


@pytest.fixture
def retriever(catalogue, data_dir, embedder) -> Retriever:
    return Retriever(catalogue, data_dir, embedder)


def found(retriever: Retriever, question: str, top_k: int = 3, filter=None, **options) -> list[str]:
    return [hit.chunk.text for hit in retriever.search("c", question, dense(top_k, **options), filter)]


def dense(top_k: int, **options) -> SearchConfig:
    return SearchConfig(top_k, **{"search_mode": "dense", "max_similarity": 1.0, **options})


def test_the_nearest_chunk_comes_first_with_its_source(retriever, add):
    add("birds", "the penguin swims", "the eagle flies")
    add("rocks", "granite is hard")
    hits = retriever.search("c", "penguin swims", dense(2))
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
    assert found(retriever, "the penguin walks", score_threshold=0.99) == []


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
        return found(retriever, "the penguin swims", 1, search_mode="hybrid") == ["the penguin swims"]

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(work, range(60)))


def test_an_empty_question_is_refused(retriever):
    with pytest.raises(InvalidValue, match="question"):
        retriever.search("c", " ", SearchConfig())


def test_a_collection_of_another_embedding_model_is_refused(retriever, catalogue):
    catalogue.open_collection("other", "words-1", "another-model", 64)
    with pytest.raises(CollectionMismatch, match=r"another-model.*hashing-1"):
        retriever.search("other", "x", SearchConfig())


# --- by words, and both -----------------------------------------------------------------------------------------------


def texts(hits) -> list[str]:
    return [hit.chunk.text for hit in hits]


def test_lexical_search_finds_only_what_shares_a_word(retriever, add):
    add("d", "the penguin swims", "granite is hard", "a penguin, a penguin, the penguin")
    hits = retriever.search("c", "Where do PENGUINS live?", SearchConfig(search_mode="lexical"))
    assert texts(hits) == ["a penguin, a penguin, the penguin", "the penguin swims"]
    assert 1 > hits[0].score > hits[1].score > 0
    assert retriever.search("c", "basalt?", SearchConfig(search_mode="lexical")) == []


def test_lexical_search_embeds_nothing(catalogue, data_dir, add):
    class Deaf:
        fingerprint, dim = "hashing-1", 64

    add("d", "the penguin swims")
    retriever = Retriever(catalogue, data_dir, Deaf())
    assert len(retriever.search("c", "penguin", SearchConfig(search_mode="lexical"))) == 1
    with pytest.raises(AttributeError, match="embed_question"):
        retriever.search("c", "penguin", SearchConfig(search_mode="hybrid"))


def test_fusion_adds_up_scores_as_shares_of_each_rankings_best():
    dense, lexical = [(7, 0.9), (8, 0.6), (9, -0.1)], [(8, 20.0), (5, 5.0)]
    fused = fuse([(dense, 0.4), (lexical, 0.6)], "scores")
    assert dict(fused) == pytest.approx({7: 0.4, 8: 0.4 * 2 / 3 + 0.6, 9: 0, 5: 0.6 / 4})
    assert [row for row, _ in fused] == [8, 7, 5, 9]
    assert fuse([(dense, 0.5), (dense, 0.5)], "scores")[0] == (7, 1.0)
    assert fuse([([(1, -0.2), (2, -0.3)], 1.0), ([], 0.0)], "scores") == [(1, 0.0), (2, 0.0)]


def test_fusion_by_rank_adds_up_reciprocal_ranks_as_a_share_of_the_best_possible():
    dense, lexical = [(7, 0.9), (8, 0.8), (9, 0.1)], [(8, 0.5), (5, 0.4)]
    fused = fuse([(dense, 0.4), (lexical, 0.6)], "ranks")
    assert dict(fused) == pytest.approx({7: 0.4, 8: 0.4 * 11 / 12 + 0.6, 9: 0.4 * 11 / 13, 5: 0.6 * 11 / 12})
    assert [row for row, _ in fused] == [8, 5, 7, 9]
    assert fuse([(dense, 0.5), (dense, 0.5)], "ranks")[0] == (7, 1.0)


@given(
    dense=st.dictionaries(st.integers(0, 9), st.floats(-1, 1)),
    lexical=st.dictionaries(st.integers(0, 9), st.floats(1e-3, 1e3)),
    scale=st.floats(1e-2, 1e2),
    weight=st.floats(0, 1),
)
def test_fusion_does_not_depend_on_the_scale_of_a_ranking(dense, lexical, scale, weight):
    by_meaning, by_words = (sorted(r.items(), key=lambda item: -item[1]) for r in (dense, lexical))
    ours = fuse([(by_meaning, 1 - weight), (by_words, weight)], "scores")
    scaled = [(row, score * scale) for row, score in by_words]
    theirs = fuse([(by_meaning, 1 - weight), (scaled, weight)], "scores")
    assert dict(ours) == pytest.approx(dict(theirs), abs=1e-9)
    assert all(0 <= score <= 1 for _, score in ours) and {row for row, _ in ours} == {*dense, *lexical}


@pytest.mark.parametrize("fusion", ["scores", "ranks"])
def test_hybrid_search_finds_what_either_search_finds(retriever, add, fusion):
    """The first shares words with the question; the second only its meaning, which this embedder sees in no word."""
    add("d", *(f"granite {i} is hard" for i in range(150)), "the zebra swims", "the penguin dives")
    hybrid = SearchConfig(search_mode="hybrid", fusion=fusion, max_similarity=1, top_k=200)
    hits = retriever.search("c", "penguin dives", hybrid)
    assert len(hits) == 152 and hits[0].score == pytest.approx(1.0)
    assert texts(hits)[0] == "the penguin dives"
    assert all(a.score >= b.score for a, b in pairwise(hits))
    only_dense = [hit.score for hit in hits if "penguin" not in hit.chunk.text]
    assert max(only_dense) <= 1 - hybrid.lexical_weight


@pytest.mark.parametrize(("weight", "mode"), [(0.0, "dense"), (1.0, "lexical")])
def test_hybrid_search_with_all_weight_on_one_side_ranks_as_that_side(retriever, add, weight, mode):
    add("d", "the penguin swims", "a zebra swims", "granite is hard", "penguin, penguin!")
    one_sided = SearchConfig(search_mode="hybrid", lexical_weight=weight)
    expected = retriever.search("c", "does a penguin swim", SearchConfig(search_mode=mode))
    assert texts(retriever.search("c", "does a penguin swim", one_sided)) == texts(expected) != []


def test_every_mode_follows_the_changes_of_a_collection(retriever, add, catalogue):
    for mode in ("lexical", "hybrid"):
        search = SearchConfig(search_mode=mode)
        add("d", "penguin one", "penguin two")
        assert len(retriever.search("c", "penguin", search)) == 2
        add("d", "penguin three")
        assert texts(retriever.search("c", "penguin", search)) == ["penguin three"]
        catalogue.delete_document("c", "d")
        assert retriever.search("c", "penguin", search) == []


def test_the_threshold_cuts_the_score_of_each_mode(retriever, add):
    add("d", "the penguin swims", "granite is hard", "basalt is dark")
    for mode in ("dense", "lexical", "hybrid"):
        every = retriever.search("c", "penguin", SearchConfig(search_mode=mode))
        least = (every[0].score + (every[1].score if len(every) > 1 else 0)) / 2
        some = retriever.search("c", "penguin", SearchConfig(search_mode=mode, score_threshold=least))
        assert texts(some) == ["the penguin swims"]


# --- several collections ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["dense", "lexical", "hybrid"])
def test_several_collections_are_ranked_as_one(retriever, add, catalogue, mode):
    """The same passages in one collection and spread over two: but for the rarity of words, all is as in one."""
    catalogue.open_collection("other", "words-1", "hashing-1", 64)
    catalogue.open_collection("both", "words-1", "hashing-1", 64)
    for collection in ("c", "both"):
        add("d", "the penguin swims", "granite is hard", "basalt is dark", collection=collection)
    for collection in ("other", "both"):
        add("e", "penguin swims, the penguin", "marble is white", "slate is grey", collection=collection)
    search = SearchConfig(top_k=3, search_mode=mode, max_similarity=1)
    spread = retriever.search_all(("c", "other"), "the penguin swims", search)
    pooled = retriever.search("both", "the penguin swims", search)
    assert set(texts(spread)) == set(texts(pooled)) and (mode != "dense" or texts(spread) == texts(pooled))
    assert {hit.collection for hit in spread[:2]} == {"c", "other"}
    assert [hit.score for hit in spread] == sorted((hit.score for hit in spread), reverse=True)


def test_a_poor_collection_does_not_get_ahead_by_being_the_best_of_its_own(retriever, add, catalogue):
    catalogue.open_collection("rocks", "words-1", "hashing-1", 64)
    add("d", "the emperor penguin swims", "granite is hard", "basalt is dark")
    add("e", "a penguin", "marble is white", "slate is grey", collection="rocks")
    search = SearchConfig(top_k=2, search_mode="hybrid")
    hits = retriever.search_all(("rocks", "c"), "emperor penguin swims", search)
    assert texts(hits) == ["the emperor penguin swims", "a penguin"] and hits[0].score == 1 > hits[1].score


def test_a_chunk_of_two_collections_is_found_once(retriever, add, catalogue):
    catalogue.open_collection("other", "words-1", "hashing-1", 64)
    for collection in ("c", "other"):
        add("d", "the penguin swims", collection=collection)
    for collections in (("c", "other"), ("c", "c")):
        (hit,) = retriever.search_all(collections, "penguin", SearchConfig())
        assert hit.collection == "c"


# --- near-duplicates --------------------------------------------------------------------------------------------------


def test_a_near_duplicate_is_left_out_for_the_next_best(retriever, add):
    long = "the penguin swims in the cold sea around the ice and hunts for krill and small fish all day"
    add("d", long, f"{long} long", "a penguin walks")
    search = SearchConfig(top_k=2, search_mode="dense", max_similarity=0.95)
    assert texts(retriever.search("c", long, search)) == [long, "a penguin walks"]
    every = SearchConfig(top_k=2, search_mode="dense", max_similarity=1)
    assert texts(retriever.search("c", long, every)) == [long, f"{long} long"]


def test_passages_that_differ_in_a_number_are_no_duplicates(catalogue, retriever):
    """Embeddings hardly see numbers: two invoices of one customer have nearly the same vector."""
    some = ["Invoice 1 of 30 euros.", "Invoice 2 of 90 euros.", "Invoice no 1 of 30 euros."]
    chunks = [Chunk("", text, (i,), "d", i) for i, text in enumerate(some)]
    vectors = np.zeros((3, 64), np.float32)
    vectors[:, 0] = 1
    catalogue.replace_document("c", Document("d", "d", (Section("", "x"),), "d"), chunks, vectors)
    assert texts(retriever.search("c", "euros", SearchConfig(search_mode="dense"))) == some[:2]


def test_a_collection_full_of_near_duplicates_is_searched_to_its_end(retriever, add):
    long = "the penguin swims in the cold sea around the ice and hunts for krill and small fish all day and night"
    add("d", *(f"{long}{' !' * i}" for i in range(1, 330)), "granite is hard")
    search = SearchConfig(top_k=2, search_mode="dense")
    assert texts(retriever.search("c", long, search)) == [f"{long} !", "granite is hard"]


# --- filters ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def add_tagged(catalogue, word_encoder, embedder):
    def add_document(document_id: str, text: str, **metadata) -> None:
        chunk = Chunk("", text, tuple(word_encoder.encode("", text)), document_id, 0)
        document = Document(document_id, document_id, (Section("", text),), document_id, metadata)
        catalogue.replace_document("c", document, [chunk], embedder.embed([text]))

    return add_document


@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat", "HNSW8", "PQ4x4"])
@pytest.mark.parametrize("mode", ["dense", "lexical", "hybrid"])
def test_a_filtered_search_finds_all_that_fits_whatever_the_index(
    catalogue, data_dir, embedder, add_tagged, factory, mode
):
    """The few that fit are the worst of 160 for the question, so that no index finds them by looking at the best."""
    for i in range(160):
        add_tagged(f"d{i}", f"penguin number {i} swims" if i % 32 else f"a penguin, otherwise wholly granite {i}", n=i)
    retriever = Retriever(catalogue, data_dir, embedder, VectorIndexConfig(faiss_factory=factory))
    search = SearchConfig(top_k=10, search_mode=mode, max_similarity=1)
    rare = Comparison("n", "in", tuple(float(i) for i in range(0, 160, 32)))
    hits = retriever.search("c", "penguin number swims", search, rare)
    assert {hit.chunk.document_id for hit in hits} == {f"d{i}" for i in range(0, 160, 32)}
    none = Comparison("n", "gt", 1000)
    assert retriever.search("c", "penguin number swims", search, none) == []


def test_filtered_flat_search_is_exact(retriever, add_tagged):
    for i in range(60):
        add_tagged(f"d{i}", f"penguin {'swims ' * (i % 7)} {i}", even=i % 2 == 0)
    every = retriever.search("c", "penguin swims", dense(60))
    expected = [hit for hit in every if int(hit.chunk.document_id[1:]) % 2 == 0][:10]
    hits = retriever.search("c", "penguin swims", dense(10), Comparison("even", "eq", True))
    assert [(h.chunk.chunk_id, h.score) for h in hits] == [(h.chunk.chunk_id, h.score) for h in expected]


def test_of_a_chunk_in_two_documents_the_one_that_fits_is_cited(retriever, add_tagged):
    add_tagged("old", "the penguin swims", year=1999)
    add_tagged("new", "the penguin swims", year=2020)
    for mode in ("dense", "lexical", "hybrid"):
        (hit,) = retriever.search("c", "penguin", SearchConfig(search_mode=mode), Comparison("year", "gte", 2000))
        assert hit.source == "new"


# --- re-ranking -------------------------------------------------------------------------------------------------------


class LongestFirst:
    """Judges a text by its length."""

    name = "longest"

    def __init__(self) -> None:
        self.num_texts = 0

    def scores(self, question, texts):
        self.num_texts = len(texts)
        return [min(1.0, len(text) / 100) for text in texts]


def test_the_reranker_sorts_the_candidates_and_its_scores_are_the_hits(catalogue, data_dir, embedder, add):
    add(
        "d",
        "penguin",
        "the penguin swims",
        "the penguin swims in the sea",
        "granite is hard and grey and old, very old",
    )
    longest = LongestFirst()
    retriever = Retriever(catalogue, data_dir, embedder, reranker=longest)
    search = SearchConfig(top_k=2, search_mode="dense", reranker="longest", rerank_candidates=3)
    hits = retriever.search("c", "penguin", search)
    assert texts(hits) == ["the penguin swims in the sea", "the penguin swims"]  # granite was no candidate
    assert [hit.score for hit in hits] == [0.28, 0.17] and longest.num_texts == 3
    strict = SearchConfig(top_k=2, search_mode="dense", reranker="longest", rerank_candidates=1, score_threshold=0.2)
    assert texts(retriever.search("c", "penguin", strict)) == [] and longest.num_texts == 2  # top_k at least
    assert texts(retriever.search("c", "penguin", SearchConfig(top_k=1))) == ["penguin"]


@pytest.mark.parametrize("loaded", [None, LongestFirst()])
def test_a_reranker_that_is_not_loaded_is_refused_by_name(catalogue, data_dir, embedder, loaded):
    retriever = Retriever(catalogue, data_dir, embedder, reranker=loaded)
    with pytest.raises(InvalidValue, match=r"reranker.*other/model"):
        retriever.search("c", "x", SearchConfig(reranker="other/model"))


# --- with the real model ----------------------------------------------------------------------------------------------


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
        hits = Retriever(catalogue, data_dir, minilm).search("c", "Where do penguins breed?", dense(1))
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
        hits = [retriever.search("c", f"What is known of {r['title']}?", dense(3)) for r in records]
        elapsed = time.perf_counter() - start
    right = [r["title"] in [h.chunk.title for h in found] for r, found in zip(records, hits, strict=True)]
    assert sum(right) / len(right) > 0.9
    assert elapsed / len(records) < 1.0
