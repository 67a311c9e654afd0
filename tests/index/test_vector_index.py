"""The vector index: exact where it says so, always that of the catalogue, whatever happened to its file."""

import logging

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from index import InvalidValue, VectorIndex, VectorIndexConfig, open_index
from index.vector_index import IndexStamp, stamp_of, update_index

FLAT = VectorIndexConfig()


def unit_vectors(n: int, dim: int = 16, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def rows(n: int, start: int = 100) -> np.ndarray:
    return np.arange(start, start + n, dtype=np.int64)


@given(n=st.integers(0, 40), m=st.integers(1, 4), top_k=st.integers(1, 50), seed=st.integers(0, 99))
def test_flat_search_is_exact(n, m, top_k, seed):
    vectors, questions = unit_vectors(n, seed=seed), unit_vectors(m, seed=seed + 1000)
    scores, row_ids = VectorIndex.build(rows(n), vectors, FLAT).search(questions, top_k)
    expected = np.sort(questions @ vectors.T, axis=1)[:, ::-1][:, :top_k]
    assert scores.shape == row_ids.shape == (m, min(top_k, n))
    assert np.allclose(scores, expected, atol=1e-5)
    assert np.allclose(np.einsum("md,mkd->mk", questions, vectors[row_ids - 100]), scores, atol=1e-5)


def test_what_is_removed_is_not_found_and_what_is_added_is():
    vectors = unit_vectors(30)
    index = VectorIndex.build(rows(20), vectors[:20], FLAT)
    index.remove(rows(5))
    index.add(rows(10, start=500), vectors[20:])
    assert set(index.row_ids.tolist()) == set(range(105, 120)) | set(range(500, 510))
    for row, vector in ((107, vectors[7]), (503, vectors[23])):
        assert index.search(vector[None], 1)[1][0, 0] == row
    assert 102 not in index.search(vectors[2][None], 25)[1]


@pytest.mark.parametrize(
    ("factory", "least"), [("Flat", 1), ("IVF8,Flat", 1), ("HNSW16", 0.9), ("SQ8", 0.9), ("PCA8,IVF4,Flat", 0.5)]
)
def test_every_kind_of_index_finds_neighbours_and_is_the_same_after_saving(factory, least, tmp_path):
    vectors = unit_vectors(400)
    built = VectorIndex.build(rows(400), vectors, VectorIndexConfig(factory))
    stamp = IndexStamp(3, 7, 16, factory)
    built.save(tmp_path / "i.faiss", stamp)
    loaded, loaded_stamp = VectorIndex.load(tmp_path / "i.faiss")
    assert loaded_stamp == stamp
    found = built.search(vectors, 1)[1][:, 0]
    assert np.array_equal(loaded.search(vectors, 1)[1][:, 0], found)
    assert (found == rows(400)).mean() >= least
    assert [p.name for p in tmp_path.iterdir()] == ["i.faiss"]


def test_too_few_vectors_to_train_fall_back_to_exact_search_with_a_warning(caplog):
    index = VectorIndex.build(rows(5), unit_vectors(5), VectorIndexConfig("IVF64,Flat"))
    assert "too few" in caplog.text and index.is_fallback
    assert index.search(unit_vectors(5), 1)[1][:, 0].tolist() == rows(5).tolist()


def test_a_factory_string_that_faiss_does_not_know_is_refused_by_the_name_of_the_knob():
    with pytest.raises(InvalidValue, match=r"faiss_factory.*'Bogus'"):
        VectorIndex.build(rows(5), unit_vectors(5), VectorIndexConfig("Bogus"))


# Following the catalogue


def is_exactly(index: VectorIndex, catalogue) -> bool:
    row_ids, vectors = catalogue.vectors("c")
    same = sorted(index.row_ids.tolist()) == row_ids.tolist()
    return same and bool((index.search(vectors, 1)[0][:, 0] > 0.999).all())


@pytest.fixture
def filled(catalogue, add):
    for i in range(20):
        add(f"d{i}", f"text number {i}", f"more on {i}")
    return catalogue


def test_an_index_is_built_saved_and_loaded_again(filled, data_dir):
    assert is_exactly(open_index(filled, "c", data_dir, FLAT), filled)
    path = data_dir.index_file("c")
    written = path.stat().st_mtime_ns
    assert is_exactly(open_index(filled, "c", data_dir, FLAT), filled)
    assert path.stat().st_mtime_ns == written
    assert VectorIndex.load(path)[1] == stamp_of(filled.collection("c"), FLAT)


@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat", "HNSW16"])
def test_an_index_of_an_older_revision_is_brought_up_to_date(filled, data_dir, add, factory):
    config = VectorIndexConfig(factory)
    open_index(filled, "c", data_dir, config)
    add("d3", "changed")
    add("new", "a new one")
    filled.delete_document("c", "d5")
    index = open_index(filled, "c", data_dir, config)
    assert sorted(index.row_ids.tolist()) == filled.row_ids("c").tolist()
    assert VectorIndex.load(data_dir.index_file("c"))[1].revision == filled.collection("c").revision


def test_a_small_change_is_an_update_and_a_large_one_is_not(filled, data_dir, add):
    index = open_index(filled, "c", data_dir, FLAT)
    add("new", "a new one")
    assert update_index(index, filled, "c") and is_exactly(index, filled)
    for i in range(10):
        filled.delete_document("c", f"d{i}")
    assert not update_index(index, filled, "c")


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: b"",
        lambda raw: raw[: len(raw) // 2],
        lambda raw: raw[:500] + bytes([raw[500] ^ 1]) + raw[501:],
        lambda raw: b"garbage" * 100,
    ],
    ids=["empty", "truncated", "one bit", "garbage"],
)
def test_a_damaged_file_is_logged_and_built_anew(filled, data_dir, caplog, damage):
    open_index(filled, "c", data_dir, FLAT)
    path = data_dir.index_file("c")
    path.write_bytes(damage(path.read_bytes()))
    with caplog.at_level(logging.WARNING):
        assert is_exactly(open_index(filled, "c", data_dir, FLAT), filled)
    assert "built anew" in caplog.text
    VectorIndex.load(path)


def test_the_index_of_a_deleted_collection_is_not_taken_for_that_of_a_new_one(filled, data_dir, add):
    open_index(filled, "c", data_dir, FLAT)
    filled.delete_collection("c")
    filled.open_collection("c", "words-1", "hashing-1", 64)
    add("d", "one")
    assert is_exactly(open_index(filled, "c", data_dir, FLAT), filled)


def test_another_factory_builds_another_index(filled, data_dir):
    open_index(filled, "c", data_dir, FLAT)
    open_index(filled, "c", data_dir, VectorIndexConfig("HNSW16"))
    assert VectorIndex.load(data_dir.index_file("c"))[1].faiss_factory == "HNSW16"


def test_an_index_that_cannot_be_saved_is_used_all_the_same(filled, data_dir, caplog):
    data_dir.faiss.rmdir()
    assert is_exactly(open_index(filled, "c", data_dir, FLAT), filled)
    assert "is not saved" in caplog.text


@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat"])
def test_an_empty_collection_has_an_empty_index(catalogue, data_dir, factory):
    index = open_index(catalogue, "c", data_dir, VectorIndexConfig(factory))
    scores, row_ids = index.search(unit_vectors(2, dim=64), 5)
    assert scores.shape == row_ids.shape == (2, 0)
