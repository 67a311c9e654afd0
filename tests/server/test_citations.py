"""Which source supports which sentence, and what becomes of that on its way out."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusionrag.rag import Source
from server.citations import Attribution, CitedPiece, Citer
from server.replies.citations import chat_annotations, file_citation


def sources_of(*texts: str) -> tuple[Source, ...]:
    return tuple(
        Source(i, f"c{i}", f"d{i}", title, f"{title}.md", text)
        for i, (title, _, text) in enumerate((text.partition(": ") for text in texts), start=1)
    )


CURIE = sources_of(
    "Marie Curie: Marie Curie was born in Warsaw on 7 November 1867. She won the Nobel Prize twice.",
    "Pierre Curie: Pierre Curie was a French physicist. He married Marie Curie in 1895.",
    "Warsaw: Warsaw is the capital of Poland. It lies on the Vistula.",
    "Radium: Radium is a chemical element with the symbol Ra. It was discovered by the Curies in 1898.",
)


def cited(sentence: str, question: str = "", sources: tuple[Source, ...] = CURIE) -> list[int]:
    return [source.index for source in Attribution(question, sources).supporters(sentence)]


@pytest.mark.parametrize(
    "sentence, expected",
    [
        ("Warsaw is the capital of Poland.", [3]),
        ("The capital of Poland, WARSAW, lies on the river Vistula.", [3]),
        ("Radium was discovered in 1898.", [4]),
        ("She won the Nobel Prize twice.", [1]),
        ("He was a French physicist who married Marie in 1895.", [2]),
        ("Pierre Curie was a French physicist and radium has the symbol Ra.", [2, 4]),
        ("The weather in Lisbon will be sunny tomorrow.", []),
        ("I cannot tell that from what I was given.", []),
        ("", []),
        ("?!", []),
    ],
)
def test_a_sentence_is_supported_by_the_sources_that_hold_most_of_its_words(sentence, expected) -> None:
    assert cited(sentence) == expected


@pytest.mark.parametrize(
    "answer, question, expected",
    [
        ("1895", "When did Pierre Curie marry?", [2]),
        ("7 November 1867", "When was Marie Curie born?", [1]),
        ("the Vistula", "Which river does the capital of Poland lie on?", [3]),
        ("Warsaw", "Where was Marie Curie born?", [1]),
        ("Warsaw", "What is the capital of Poland?", [3]),
        ("Marie Curie", "Whom did Pierre Curie, the French physicist, marry?", [2]),
        ("1896", "When did Pierre Curie marry?", []),
        ("Irène Curie", "Whom did Pierre Curie marry?", []),
        ("Poland Vistula", "?", []),  # in one source, but not in one sentence
        ("Yes", "Was Radium discovered in 1898?", []),
    ],
)
def test_a_short_answer_is_supported_by_the_source_that_has_it_and_speaks_of_the_question(
    answer, question, expected
) -> None:
    assert cited(answer, question) == expected


def test_a_yes_is_not_supported_by_a_source_that_says_yes() -> None:
    assert cited("Yes.", "Is it?", sources_of("A: Yes, it is.", "B: No.")) == []


def test_a_word_counts_less_the_more_sentences_have_it() -> None:
    boat, noon = "Boats: The island boat.", "Times: Ornö at noon."
    sentence = "Ornö at noon by island boat."
    assert cited(sentence, sources=sources_of(boat, noon)) == [1, 2]
    assert cited(sentence, sources=sources_of(*[boat] * 20, noon)) == [21]


def test_words_are_compared_in_one_unicode_form_and_without_case() -> None:
    sources = sources_of("A: The STRASSE was rebuilt by cafe\u0301 owners.", "B: Nothing of the kind.")
    assert cited("Café owners rebuilt the straße.", sources=sources) == [1]


def test_chinese_and_japanese_are_compared_by_character() -> None:
    sources = sources_of("东京: 东京是日本的首都。", "柏林: 柏林是德国的首都。")
    assert cited("日本的首都是东京。", sources=sources) == [1]
    assert cited("柏林", sources=sources) == [2]


def said(pieces: list[str], style="inline", question: str = "", sources=CURIE) -> CitedPiece:
    citer = Citer(question, sources, style)
    out = [*(citer.add(piece) for piece in pieces), citer.finish()]
    return CitedPiece("".join(p.text for p in out), tuple(c for p in out for c in p.citations))


@pytest.mark.parametrize(
    "answer, expected",
    [
        ("Radium was discovered in 1898.", "Radium was discovered in 1898. [4]"),
        ("Warsaw is the capital. \n", "Warsaw is the capital. [3] \n"),
        (
            "Warsaw is the capital of Poland. Nobody knows why! She won the Nobel Prize twice.",
            "Warsaw is the capital of Poland. [3] Nobody knows why! She won the Nobel Prize twice. [1]",
        ),
        (
            "Pierre Curie was a French physicist and radium has the symbol Ra. Indeed",
            "Pierre Curie was a French physicist and radium has the symbol Ra. [2][4] Indeed",
        ),
        (
            "1. Warsaw is the capital of Poland\n2. Radium is a chemical element",
            "1. Warsaw is the capital of Poland [3]\n2. Radium is a chemical element [4]",
        ),
        ("Dr. Pierre Curie, a French physicist.", "Dr. Pierre Curie, a French physicist. [2]"),
        ("“Warsaw is the capital of Poland.” So", "“Warsaw is the capital of Poland.” [3] So"),
        ("1895", "1895 [2]"),
        ("", ""),
        (" \n", " \n"),
    ],
)
def test_markers_stand_behind_their_sentences(answer: str, expected: str) -> None:
    assert said([answer], question="When did Pierre Curie marry?").text == expected
    assert said(list(answer), question="When did Pierre Curie marry?").text == expected


def test_sentences_end_without_a_space_where_the_script_has_none() -> None:
    sources = sources_of("东京: 东京是日本的首都。", "柏林: 柏林是德国的首都。")
    text = said(["日本的首都是东京。", "德国的首都是柏林。"], sources=sources).text
    assert text == "日本的首都是东京。 [1]德国的首都是柏林。 [2]"


def test_a_sentence_is_cited_with_the_first_letter_behind_it() -> None:
    citer = Citer("", CURIE, "annotations")
    pieces = [citer.add(piece) for piece in ("Radium was", " discovered in 1898", ".", " ", "Then")]
    assert [bool(piece.citations) for piece in pieces] == [False, False, False, False, True]
    assert [piece.text for piece in pieces] == ["Radium was", " discovered in 1898", ".", "", " Then"]
    assert citer.finish() == CitedPiece("")


def test_without_citations_or_sources_the_pieces_pass_through_untouched() -> None:
    for style, sources in (("none", CURIE), ("inline", ())):
        citer = Citer("", sources, style)
        assert citer.add("Radium was discovered in 1898. ") == CitedPiece("Radium was discovered in 1898. ")
        assert citer.finish() == CitedPiece("")


WORDS = ["Warsaw", "Curie", "radium", "1898", "the", "capital", "of", "Poland", "twice", "e.g", "Dr", "日本", "ö"]
TEXTS = st.lists(
    st.sampled_from([*WORDS, *WORDS, ".", ".", "!", "?", "…", "。", "”", ")", " ", " ", " ", "\n", "\t", "[1]"]),
    max_size=60,
).map("".join)


@settings(deadline=None)
@given(TEXTS, st.lists(st.integers(0, 200)), st.sampled_from(["annotations", "inline", "none"]))
def test_citations_do_not_depend_on_how_the_answer_was_cut(text: str, cuts: list[int], style) -> None:
    at = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[a:b] for a, b in pairwise(at)]
    assert said(pieces, style) == said([text], style)


@settings(deadline=None)
@given(st.text() | TEXTS)
def test_annotated_text_is_the_answer_and_marked_text_is_the_answer_with_markers(text: str) -> None:
    annotated, marked = said([text], "annotations"), said([text], "inline")
    assert annotated.text == text
    assert [(c.number, c.source) for c in annotated.citations] == [(c.number, c.source) for c in marked.citations]
    assert [c.number for c in annotated.citations] == list(range(len(annotated.citations)))
    for plain, shown in zip(annotated.citations, marked.citations, strict=True):
        assert text[plain.begin : plain.end] == marked.text[shown.begin : shown.end]
        assert text[plain.begin : plain.end].strip() == text[plain.begin : plain.end] != ""
        assert marked.text[shown.end :].lstrip(" []0123456789") != marked.text[shown.end :]


@settings(deadline=None)
@given(st.text(), st.text(), st.lists(st.text(), max_size=4))
def test_any_text_can_be_attributed_and_twice_the_same(sentence: str, question: str, texts: list[str]) -> None:
    sources = tuple(Source(i, "", "", "", "", text) for i, text in enumerate(texts, 1))
    found = Attribution(question, sources).supporters(sentence)
    assert list(found) == sorted(set(found), key=lambda source: source.index)
    assert found == Attribution(question, sources).supporters(sentence)


def test_a_sentence_of_a_source_is_cited_from_it_whatever_the_others_say() -> None:
    for source in CURIE:
        for sentence in source.text.split(". "):
            assert source.index in cited(sentence)


def seconds(function) -> float:
    """The best of three."""
    times = []
    for _ in range(3):
        begin = time.process_time()
        function()
        times.append(time.process_time() - begin)
    return min(times)


@pytest.mark.parametrize(
    "unit", ["Radium was discovered in 1898. ", "radium ", "radium", ".", " ", "x. ", "。", "”", "\n", "1898\n"]
)
def test_the_work_grows_with_the_length_of_the_answer_not_faster(unit: str) -> None:
    def run(num_pieces: int) -> None:
        citer = Citer("", CURIE, "inline")
        for _ in range(num_pieces):
            citer.add(unit)
        citer.finish()

    assert seconds(lambda: run(8_000)) < 8 * seconds(lambda: run(2_000)) + 0.05, "four times the pieces"


@pytest.mark.parametrize("unit", ["word ", "Curie was here. ", ".", "\n", "。", "a", " "])
def test_the_work_grows_with_the_length_of_the_sources_not_faster(unit: str) -> None:
    def run(num_units: int) -> None:
        assert cited("Who was it that was here?", sources=(Source(1, "", "", "", "", unit * num_units),)) is not None

    assert seconds(lambda: run(40_000)) < 8 * seconds(lambda: run(10_000)) + 0.05, "four times the text"


FILE = "file-" + "0123456789ab" * 2


@pytest.mark.parametrize(
    "document_id, source, file_id, filename",
    [
        (FILE, "report #3.pdf", FILE, "report #3.pdf"),
        (f"{FILE}-0123456789abcdef", "data #3.jsonl#17", FILE, "data #3.jsonl"),
        ("wiki/warsaw.md", "/docs/wiki/warsaw.md", "wiki/warsaw.md", "/docs/wiki/warsaw.md"),
        ("file-of-mine", "x", "file-of-mine", "x"),
        ("document-1", "", "document-1", "Title"),
    ],
)
def test_an_uploaded_file_is_cited_under_its_id_and_name_other_documents_under_theirs(
    document_id, source, file_id, filename
) -> None:
    found = Source(1, "c1", document_id, "Title", source, "Warsaw is the capital of Poland.")
    (citation,) = said(["Warsaw is the capital of Poland."], "annotations", sources=(found,)).citations
    expected = {"type": "file_citation", "index": 32, "file_id": file_id, "filename": filename}
    assert file_citation(citation).model_dump() == expected
    url, file = (annotation.model_dump() for annotation in chat_annotations([citation]))
    at = {"start_index": 0, "end_index": 32}
    assert url == {"type": "url_citation", "index": 0, "url_citation": {"url": source, "title": "Title", **at}}
    assert file["index"] == 1
    assert file["file_citation"] == {"file_id": file_id, "filename": filename, **at}
