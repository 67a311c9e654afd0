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


def test_nearly_copies_are_left_out_where_the_threshold_says_so(films):
    words = made_of({**films, "copy": films["film 3"] + " Silent."})
    assert "copy" not in words.nearest("film 3", 5, near_duplicate=0.3)
    assert "copy" in words.nearest("film 3", 5)


def test_a_passage_that_two_chunks_hold_does_not_link_them_and_its_names_stay_rare(films):
    """Chunks that overlap, or repeat a notice, are not related for that."""
    notice = "Notice: kept by Archivist9 of Elsewhere9."
    words = made_of({**{name: f"{text}\n\n{notice}" for name, text in films.items()}, "keeper": "Archivist9 retired."})
    for i in range(40):
        assert words.nearest(f"film {i}", 2)[0] == f"director {i}"
    assert words.nearest("keeper", 1) and "film 5" in words.nearest("keeper", 99)


PLAIN = "it was said in those days that"  # so many words that a passage does not open with what comes then


def test_the_best_pair_of_passages_decides_not_what_long_chunks_share_by_chance():
    chance = [f"{PLAIN} chance{i}" for i in range(5)]
    texts = {
        "one": "\n\n".join([f"{PLAIN} Ann Ohm sang it", *chance]),
        "chance": "\n\n".join(f"{PLAIN} {end} of chance{i}" for i, end in enumerate("abcde")),
        "singer": f"{PLAIN} her name was Ann Ohm",
        **{f"other {i}": f"{PLAIN} nothing{i}" for i in range(20)},
    }
    assert made_of(texts).nearest("one", 2) == ("singer", "chance")
    in_one_piece = made_of({name: text.replace("\n\n", " ") for name, text in texts.items()})
    assert in_one_piece.nearest("one", 2) == ("chance", "singer")


def test_a_passage_that_opens_with_the_name_comes_before_one_that_only_mentions_it():
    texts = {
        "song": f"{PLAIN} Quill sang",
        "mention": f"{PLAIN} one Quill",
        "about": f"Quill: {PLAIN} he lived",
        **{f"other {i}": f"{PLAIN} nothing{i}" for i in range(20)},
    }
    words = made_of(texts)
    assert words.nearest("song", 2) == ("about", "mention")
    assert words.nearest("about", 2) == ("song", "mention")


def test_a_full_name_outweighs_its_parts():
    texts = {
        "song": f"{PLAIN} Ann Ohm sang",
        "parts": f"{PLAIN} one Ann met one Ohm",
        "singer": f"{PLAIN} her name was Ann Ohm",
        **{f"other {i}": f"{PLAIN} nothing{i}" for i in range(20)},
    }
    assert made_of(texts).nearest("song", 2) == ("singer", "parts")


def test_what_is_found_depends_on_texts_and_order_alone(films):
    shuffled = list(films)
    random.Random(1).shuffle(shuffled)
    a, b = made_of(films), made_of({name: films[name] for name in shuffled})
    assert all(a.nearest(name, 4) == b.nearest(name, 4) for name in films)


def test_an_unknown_name_is_near_nothing_and_a_second_text_of_a_name_is_ignored(films):
    words = made_of(films)
    words.add("film 1", "Person2")
    assert words.nearest("film 1", 3) == ("director 1",) and words.nearest("nobody", 3) == ()
