"""BM25: the same words find each other whatever their form, a question is never syntax, and nothing is left behind."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from index import CatalogueError, Chunk, Document, Section
from index.lexical import MAX_TERMS, match_expression, saturated


def found(catalogue, question: str, limit: int = 10, collection: str = "c") -> list[str]:
    rows = catalogue.rows_by_words(collection, question, limit)
    chunks = catalogue.chunks_by_row(collection, [row for row, _ in rows])
    return [chunks[row].chunk.text for row, _ in rows]


def words_held(catalogue, collection: str = "c") -> int:
    """Rows in the collection's table of words."""
    key = catalogue.collection(collection).collection_id
    with catalogue.database.read() as connection:
        return int(connection.execute(f"SELECT count(*) FROM fts_{key}_docsize").fetchone()[0])


@pytest.mark.parametrize(
    ("text", "question"),
    [
        ("The penguins were swimming", "penguin swim"),
        ("Étude en forme de poire", "etude"),
        ("Cafe\u0301 society", "CAFÉ"),
        ("A well-known fact", "what is well known?"),
        ("the file main_loop.py", "main_loop"),
        ("東京は日本の首都です", "日本の首都はどこ"),
        ("ประเทศไทยมีเมืองหลวง", "เมืองหลวง"),
        ("Lange Straße 12", "STRAẞE straße"),
    ],
)
def test_words_are_found_whatever_their_form_or_script(catalogue, add, text, question):
    add("d", text, "something else")
    assert found(catalogue, question)[0] == text


@pytest.mark.parametrize(
    "question",
    ['"', '""', "penguin\" OR title:x", "title : penguin", "NEAR(a b)", "penguin*", "^penguin", "(penguin", "-penguin",
     "penguin AND NOT swims", "{a b}: c", "penguin\0swims", "penguin '; DROP TABLE chunks; --", "a + b"],
)  # fmt: skip
def test_what_fts_would_read_as_syntax_is_words_to_us(catalogue, add, question):
    add("d", "the penguin swims", "granite is hard")
    expected = ["the penguin swims"] if "penguin" in question else []
    assert found(catalogue, question) == expected


@given(question=st.text())
def test_every_question_has_an_expression_of_quoted_words(question):
    expression = match_expression(question)
    for part in filter(None, expression.split(" OR ")):
        assert part[0] == part[-1] == '"' and len(part) > 2 and '"' not in part[1:-1]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(question=st.text(max_size=200))
def test_no_question_breaks_a_search(catalogue, add, question):
    add("d", "the penguin swims")
    catalogue.rows_by_words("c", question, 3)


def test_a_question_as_long_as_a_book_is_cut_to_its_longest_words(catalogue, add):
    add("d", "the extraordinarily peculiar penguin", "granite is hard")
    question = " ".join(f"word{i}" for i in range(20_000)) + " extraordinarily"
    assert match_expression(question).count(" OR ") == MAX_TERMS - 1
    assert found(catalogue, question) == ["the extraordinarily peculiar penguin"]


def test_a_question_without_words_finds_nothing(catalogue, add):
    add("d", "the penguin swims")
    assert found(catalogue, "?! … —") == [] == found(catalogue, "")


def test_a_collection_that_never_held_a_document_finds_nothing(catalogue):
    assert found(catalogue, "penguin") == []


def test_titles_are_searched_too(catalogue, word_encoder):
    chunks = [
        Chunk(t, "it swims", tuple(word_encoder.encode(t, "it swims")), "d", i) for i, t in enumerate(["Eel", "Owl"])
    ]
    document = Document("d", "d", (Section("", "x"),), "d")
    catalogue.replace_document("c", document, chunks, np.zeros((2, 64), np.float32))
    rows = catalogue.rows_by_words("c", "the owl", 5)
    assert [catalogue.chunks_by_row("c", [row])[row].chunk.title for row, _ in rows] == ["Owl"]


def test_a_word_of_the_title_counts_for_more(catalogue, word_encoder):
    pairs = [("Owl", "it swims by night"), ("Eel", "an owl of old"), ("Bat", "it flies by night")]
    chunks = [Chunk(t, x, tuple(word_encoder.encode(t, x)), "d", i) for i, (t, x) in enumerate(pairs)]
    catalogue.replace_document("c", Document("d", "d", (Section("", "x"),), "d"), chunks, np.zeros((3, 64), np.float32))
    rows = catalogue.rows_by_words("c", "owl", 5)
    assert [catalogue.chunks_by_row("c", [row])[row].chunk.title for row, _ in rows] == ["Owl", "Eel"]
    assert rows[0][1] > 1.2 * rows[1][1]


def test_the_value_is_bm25(catalogue, add):
    """By hand: 4 chunks of 2 words, one with the word: idf = ln((4 - 1 + 0.5) / (1 + 0.5)), frequency part 1."""
    add("d", "penguin swims", "granite hard", "basalt dark", "marble white")
    ((_, value),) = catalogue.rows_by_words("c", "penguin", 5)
    assert value == pytest.approx(math.log(3.5 / 1.5))
    assert saturated(value) == pytest.approx(value / (value + 10))


def test_the_limit_and_the_rows_asked_for_bound_what_is_found(catalogue, add):
    add("d", *(f"penguin {'x ' * i}" for i in range(1, 9)))
    rows = [row for row, _ in catalogue.rows_by_words("c", "penguin", 100)]
    assert len(rows) == 8
    assert [row for row, _ in catalogue.rows_by_words("c", "penguin", 3)] == rows[:3]
    assert [row for row, _ in catalogue.rows_by_words("c", "penguin", 2, rows[5:])] == rows[5:7]
    assert catalogue.rows_by_words("c", "penguin", 3, []) == []


def test_no_score_depends_on_another_collection(catalogue, add):
    add("d", "the penguin swims", "granite is hard", "basalt is dark")
    before = catalogue.rows_by_words("c", "penguin", 5)
    catalogue.open_collection("other", "words-1", "hashing-1", 64)
    add("d", *(f"penguin {i}" for i in range(50)), collection="other")
    assert catalogue.rows_by_words("c", "penguin", 5) == before
    assert len(found(catalogue, "penguin", 100, "other")) == 50


def test_replaced_and_deleted_documents_leave_no_words_and_no_weight(catalogue, add):
    """Scores after many changes equal those of a collection that was filled once."""
    for i in range(5):
        add("a", f"penguin number {i}", "granite is hard")
        add("b", "東京 penguin")
    catalogue.delete_document("c", "b")
    catalogue.open_collection("fresh", "words-1", "hashing-1", 64)
    add("a", "penguin number 4", "granite is hard", collection="fresh")
    assert found(catalogue, "東 3") == []
    assert [s for _, s in catalogue.rows_by_words("c", "penguin hard", 5)] == [
        s for _, s in catalogue.rows_by_words("fresh", "penguin hard", 5)
    ]
    assert words_held(catalogue) == 2


def test_a_change_that_fails_leaves_the_words_as_they_were(catalogue, add):
    add("d", "the penguin swims")
    same_place = [Chunk("", f"a zebra {i}", (i,), "d", 0) for i in range(2)]
    with pytest.raises(CatalogueError, match="UNIQUE"):
        catalogue.replace_document("c", Document("d", "d", (), "d"), same_place, np.zeros((2, 64), np.float32))
    assert found(catalogue, "zebra penguin") == ["the penguin swims"] and words_held(catalogue) == 1


def test_a_collection_made_anew_under_an_old_name_has_none_of_the_old_words(catalogue, add):
    add("d", "the penguin swims")
    catalogue.delete_collection("c")
    with catalogue.database.read() as connection:
        assert not connection.execute("SELECT name FROM sqlite_master WHERE name LIKE 'fts_%'").fetchall()
    catalogue.open_collection("c", "words-1", "hashing-1", 64)
    assert found(catalogue, "penguin") == []
    add("d", "a penguin again")
    assert found(catalogue, "penguin") == ["a penguin again"]
