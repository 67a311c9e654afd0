"""Chunks that name the same rare thing find each other, whatever else they say; common words count for nothing."""

from __future__ import annotations

import random

import pytest

from index.rare_words import ALWAYS_RARE, RareWords


def made_of(texts):
    words = RareWords()
    for name, text in texts.items():
        words.add(name, text)
    return words


@pytest.fixture
def films():
    """A film and its director share a name; films share the words of films, directors those of directors."""
    texts = {}
    for i in range(40):
        texts[f"film {i}"] = f"Title{i} is a film directed by Person{i}, released in June."
        texts[f"director {i}"] = f"Person{i} was a director, born in the town of Place{i}."
    return texts


def test_a_shared_name_outweighs_all_the_words_of_a_genre(films):
    words = made_of(films)
    for i in range(40):
        assert words.nearest(f"film {i}", 3) == (f"director {i}",)
        assert words.nearest(f"director {i}", 3) == (f"film {i}",)


def test_case_and_punctuation_do_not_matter(films):
    words = made_of({**films, "note": "(PERSON7!)"})
    assert set(words.nearest("note", 5)) == {"film 7", "director 7"}


def test_a_word_that_many_have_is_not_rare():
    texts = {f"t{i}": f"common own{i}" for i in range(ALWAYS_RARE + 1)}
    assert made_of(texts).nearest("t0", 5) == ()
    texts.popitem()
    assert made_of(texts).nearest("t0", 3) == ("t1", "t2", "t3")  # ties in the order in which they were added


def test_copies_are_left_out_where_the_threshold_says_so(films):
    words = made_of({**films, "copy": films["film 3"]})
    assert "copy" not in words.nearest("film 3", 5, near_duplicate=0.95)
    assert words.nearest("film 3", 5, near_duplicate=1.01)[0] == "copy"


def test_what_is_found_depends_on_texts_and_order_alone(films):
    shuffled = list(films)
    random.Random(1).shuffle(shuffled)
    a, b = made_of(films), made_of({name: films[name] for name in shuffled})
    assert all(a.nearest(name, 4) == b.nearest(name, 4) for name in films)


def test_an_unknown_name_is_near_nothing_and_a_second_text_of_a_name_is_ignored(films):
    words = made_of(films)
    words.add("film 1", "Person2")
    assert words.nearest("film 1", 3) == ("director 1",) and words.nearest("nobody", 3) == ()
