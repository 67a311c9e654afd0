"""Related chunks: the nearest others, nearest first, without the chunk itself and without its copies."""

from __future__ import annotations

import numpy as np
import pytest

from fusionrag.config import PreprocessConfig
from fusionrag.preprocess.related import SEARCH_BATCH, nearest_chunks, related_chunks, words_first
from index.rare_words import RareWords


class BruteForce:
    """Exact search by inner product; row ids are not the order of the vectors."""

    def __init__(self, vectors, first_row=1000):
        self.vectors, self.first_row, self.batches = vectors, first_row, []

    def search(self, vectors, top_k):
        self.batches.append(len(vectors))
        scores = vectors @ self.vectors.T
        order = np.argsort(-scores, axis=1, kind="stable")[:, :top_k]
        found = np.take_along_axis(scores, order, 1), order + self.first_row
        short = top_k - order.shape[1]
        if short > 0:  # fewer than asked for
            return tuple(np.pad(x, ((0, 0), (0, short)), constant_values=-1) for x in found)
        return found


@pytest.fixture
def vectors():
    drawn = np.random.default_rng(0).normal(size=(30, 5)).astype(np.float32)
    drawn[7] = drawn[3] * 2 + 0.01  # near-duplicates once they have unit length
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def find(vectors, num_related, near_duplicate=0.95, known=None):
    ids = [f"chunk {i}" for i in range(len(vectors))]
    row_ids = {1000 + i: ids[i] for i in (range(len(vectors)) if known is None else known)}
    return dict(nearest_chunks(ids, vectors, BruteForce(vectors), row_ids, num_related, near_duplicate))


@pytest.mark.parametrize("num_related", [1, 3, 8])
def test_related_chunks_are_the_nearest_that_are_not_copies(num_related, vectors):
    similar = vectors @ vectors.T
    found = find(vectors, num_related)
    for i in range(len(vectors)):
        others = [j for j in np.argsort(-similar[i]) if j != i and similar[i, j] < 0.95]
        assert found[f"chunk {i}"] == tuple(f"chunk {j}" for j in others[:num_related])
    assert "chunk 7" not in found["chunk 3"] and "chunk 3" not in found["chunk 7"]


def test_a_threshold_of_1_lets_near_duplicates_in_and_never_the_chunk_itself(vectors):
    found = find(vectors, 3, near_duplicate=1.0)
    assert found["chunk 3"][0] == "chunk 7"
    assert all(chunk_id not in related for chunk_id, related in found.items())


@pytest.fixture
def words():
    """Each chunk shares a name with the one before it; no two are alike in any other way."""
    words = RareWords()
    for i in range(30):
        words.add(f"chunk {i}", f"the Name{i} and the Name{i - 1} of number{i}")
    return words


def related(vectors, words, **config):
    index, ids = BruteForce(vectors), [f"chunk {i}" for i in range(len(vectors))]
    row_ids = {1000 + i: name for i, name in enumerate(ids)}
    return related_chunks(ids, vectors, index, row_ids, words, PreprocessConfig(**config)), index


def test_no_related_chunks_are_searched_for_when_none_are_wanted(vectors, words):
    found, index = related(vectors, words, num_related=0)
    assert set(found.values()) == {()} and len(found) == 30 and index.batches == []


@pytest.mark.parametrize("num_related", [1, 4])
def test_both_ways_of_being_related_are_joined_words_first(num_related, vectors, words):
    both, by_words, by_meaning = (
        related(vectors, words, num_related=num_related, related_by=by)[0] for by in ("both", "words", "meaning")
    )
    assert by_meaning == find(vectors, num_related)
    assert set(by_words["chunk 5"]) == set(("chunk 4", "chunk 6")[:num_related])
    for name, others in both.items():
        assert others == words_first(by_words[name], by_meaning[name], num_related)


def test_words_come_first_for_half_of_the_places_and_nobody_comes_twice():
    assert words_first("abc", "xay", 4) == ("a", "b", "x", "y")
    assert words_first("abc", "xay", 3) == ("a", "b", "x")
    assert words_first("abc", "", 3) == ("a", "b", "c")
    assert words_first("", "xy", 9) == ("x", "y")


def test_rows_that_are_no_chunks_any_more_are_skipped(vectors):
    found = find(vectors, 30, known=range(0, 30, 2))
    assert all(int(r.split()[1]) % 2 == 0 for related in found.values() for r in related)


def test_a_small_corpus_gives_fewer(vectors):
    found = find(vectors[:3], 8)
    assert {len(related) for related in found.values()} == {2}


def test_one_chunk_under_two_rows_is_related_once(vectors):
    """A chunk that stands in two documents has two rows and one KV."""
    row_ids = {1000 + i: f"chunk {i % 10}" for i in range(30)}
    index = BruteForce(vectors)
    for _, related in nearest_chunks(["x"], vectors[:1], index, row_ids, 8, 0.95):
        assert len(related) == len(set(related)) == 8


def test_a_long_corpus_is_searched_in_batches():
    many = np.eye(5, dtype=np.float32)[np.arange(SEARCH_BATCH + 3) % 5]
    index = BruteForce(many[:5])
    found = list(nearest_chunks([str(i) for i in range(len(many))], many, index, {}, 1, 0.95))
    assert [name for name, _ in found] == [str(i) for i in range(len(many))]
    assert index.batches == [SEARCH_BATCH, 3]
