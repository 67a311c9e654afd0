"""Chunks: never too long, nothing lost, cut where a reader would cut."""

import itertools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from index import Chunk, ChunkingConfig, Document, InvalidValue, Section, chunk_document
from index.sentences import Border, Piece, pieces_of, split_piece

TEXTS = st.lists(
    st.sampled_from(
        ["word ", "A sentence. ", "Dr. Who? ", "\n", "\n\n", "東京です。", "x" * 70 + " ", "- item\n", "🙂"]
    ),
    max_size=60,
).map("".join) | st.text(max_size=200)
SECTIONS = st.lists(st.builds(Section, heading=st.just(""), text=TEXTS), max_size=5)
HEADED = st.lists(
    st.builds(Section, heading=st.sampled_from(["", "Part one", "Why?", "h" * 90]), text=TEXTS), max_size=5
)
CONFIGS = st.builds(ChunkingConfig, chunk_tokens=st.integers(40, 120))


def document(*sections: Section, title: str = "Title") -> Document:
    return Document("id", title, sections, "source")


def squeezed(text: str) -> str:
    return "".join(text.split())


def is_subsequence(part, whole) -> bool:
    rest = iter(whole)
    return all(item in rest for item in part)


# Length and loss


@given(sections=HEADED, config=CONFIGS, title=st.sampled_from(["", "Title", "A very long title of many words " * 5]))
def test_no_chunk_is_longer_than_the_budget_and_each_is_encoded_as_the_encoder_would(
    sections, config, title, word_encoder, byte_encoder
):
    for encoder in (word_encoder, byte_encoder):
        for chunk in chunk_document(document(*sections, title=title), encoder, config):
            assert 0 < chunk.num_tokens <= config.chunk_tokens
            assert list(chunk.token_ids) == encoder.encode(chunk.title, chunk.text)


@given(sections=SECTIONS, config=CONFIGS)
def test_without_headings_and_overlap_the_chunks_are_exactly_the_text(sections, config, word_encoder, byte_encoder):
    for encoder in (word_encoder, byte_encoder):
        chunks = chunk_document(document(*sections), encoder, config)
        assert "".join(squeezed(c.text) for c in chunks) == squeezed("".join(s.text for s in sections))
        assert [c.ordinal for c in chunks] == list(range(len(chunks)))


@given(sections=SECTIONS, config=CONFIGS)
def test_words_that_fit_into_a_chunk_are_not_cut(sections, config, word_encoder):
    chunks = chunk_document(document(*sections), word_encoder, config)
    words = [w for s in sections for w in s.text.split()]
    if all(len(word_encoder.encode("", w)) < 10 for w in words) and "。" not in "".join(words):
        assert [w for c in chunks for w in c.text.split()] == words


@given(sections=HEADED, tokens=st.integers(60, 120), overlap=st.integers(0, 30))
def test_with_headings_and_overlap_every_word_is_there_in_order(sections, tokens, overlap, byte_encoder):
    chunks = chunk_document(document(*sections), byte_encoder, ChunkingConfig(tokens, overlap))
    wanted = squeezed("".join(s.heading + s.text for s in sections))
    assert is_subsequence(wanted, squeezed("".join(c.text for c in chunks)))


def test_a_document_that_fits_is_one_chunk_with_its_text_unchanged(word_encoder):
    text = "One  sentence.\nAnother one.\n\nA paragraph."
    (chunk,) = chunk_document(document(Section("", text)), word_encoder, ChunkingConfig())
    assert (chunk.title, chunk.text) == ("Title", text)


def test_a_document_without_text_gives_no_chunks(word_encoder):
    assert chunk_document(document(Section("", " \n ")), word_encoder, ChunkingConfig()) == []
    assert chunk_document(document(Section("Title", "")), word_encoder, ChunkingConfig()) == []


# Where chunks are cut


def chunks_of(encoder, *sections: Section, tokens: int, overlap: int = 0) -> list[Chunk]:
    return chunk_document(document(*sections, title="T"), encoder, ChunkingConfig(tokens, overlap))


def test_small_neighbouring_sections_share_a_chunk_and_the_cut_falls_between_sections(byte_encoder):
    sections = [Section(f"S{i}", "x" * 30) for i in range(6)]
    chunks = chunks_of(byte_encoder, *sections, tokens=100)
    assert [c.text for c in chunks] == [f"S{i}. {'x' * 30}\n\nS{i + 1}. {'x' * 30}" for i in (0, 2, 4)]


def test_a_chunk_that_starts_within_a_section_carries_its_heading(byte_encoder):
    text = " ".join(f"Sentence number {i} is here." for i in range(10))
    chunks = chunks_of(byte_encoder, Section("Part", text), tokens=120)
    assert len(chunks) > 2
    assert all(c.text.startswith("Part. Sentence number ") and c.text.endswith("is here.") for c in chunks)


def test_a_heading_that_repeats_the_title_is_not_written_twice(byte_encoder):
    (chunk,) = chunks_of(byte_encoder, Section("t", "Text."), tokens=100)
    assert chunk.text == "Text."


def test_a_heading_without_text_is_kept_as_text(byte_encoder):
    (chunk,) = chunks_of(byte_encoder, Section("Alone", ""), Section("What?", "This."), tokens=100)
    assert chunk.text == "Alone\n\nWhat? This."


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("A first one. " * 4 + "\n\n" + "b " * 30, ("A first one. " * 4).strip()),  # paragraph before word
        (
            "Some words to fill its half. Then " + "more words " * 9,
            "Some words to fill its half.",
        ),  # sentence before word
        ("e.g. Mr. A. Who and so on " * 8, None),  # no sentence ends at an abbreviation
        ("row one\nrow two\nrow three\n" * 8, None),
    ],
    ids=["paragraph", "sentence", "abbreviations", "lines"],
)
def test_the_strongest_border_in_reach_is_taken(byte_encoder, text, first):
    chunks = chunks_of(byte_encoder, Section("", text), tokens=80 if first is None or "\n\n" in text else 50)
    if first is not None:
        assert chunks[0].text == first
    assert "".join(squeezed(c.text) for c in chunks) == squeezed(text)


def test_a_long_run_without_sentences_is_cut_between_lines(byte_encoder):
    chunks = chunks_of(byte_encoder, Section("", "one row of it\n" * 40), tokens=100)
    assert {line for c in chunks for line in c.text.splitlines()} == {"one row of it"}


def test_pages_are_those_on_which_the_chunk_begins(byte_encoder):
    sections = [Section("", "x" * 50, page) for page in (1, 2, 3)]
    assert [c.page for c in chunks_of(byte_encoder, *sections, tokens=70)] == [1, 2, 3]


def test_overlap_repeats_whole_sentences_of_the_same_section_within_its_limit(byte_encoder):
    one = " ".join(f"Sentence {i:02}." for i in range(30))
    chunks = chunks_of(byte_encoder, Section("", one), Section("", "Other section. " * 8), tokens=100, overlap=30)
    in_first = [c for c in chunks if "Sentence" in c.text]
    for before, after in itertools.pairwise(in_first):
        repeated = [s for s in before.text.split(". ") if s.rstrip(".") in after.text]
        assert len(repeated) == 2  # two sentences of 12 bytes fit into 30, three do not
        assert before.text.endswith(after.text[:25])
    assert chunks[len(in_first)].text.startswith("Other section.")


# Titles and templates that leave little room


def test_a_title_that_leaves_no_room_is_shortened_at_a_word(byte_encoder):
    chunks = chunk_document(
        document(Section("", "text " * 40), title="many words " * 20), byte_encoder, ChunkingConfig(64)
    )
    assert {c.title for c in chunks} == {"many words many words many"}
    assert "".join(squeezed(c.text) for c in chunks) == "text" * 40


def test_a_title_of_one_endless_word_is_cut_inside(byte_encoder):
    chunks = chunk_document(document(Section("", "text " * 40), title="t" * 500), byte_encoder, ChunkingConfig(64))
    assert {c.title for c in chunks} == {"t" * 28}


@pytest.mark.parametrize("overhead", [10, 40])
def test_a_template_that_fills_the_budget_is_refused_by_the_name_of_the_knob(overhead):
    class Wide:
        fingerprint = "wide"

        def encode(self, title, text):
            return [0] * (overhead + 8 * len(text) + len(title))

    with pytest.raises(InvalidValue, match="chunk_tokens"):
        chunk_document(document(Section("", "x" * 100), title=""), Wide(), ChunkingConfig(16))


@given(sections=SECTIONS, config=CONFIGS)
def test_an_encoder_whose_parts_cost_less_than_their_sum_is_obeyed_all_the_same(sections, config):
    """The costs of single sentences, counted without the title, are half of what they cost in the passage."""

    class Dear:
        fingerprint = "dear"

        def encode(self, title, text):
            return list(f"{title}: {text}".encode()) * (2 if title else 1)

    chunks = chunk_document(document(*sections), Dear(), config)
    assert all(c.num_tokens <= config.chunk_tokens for c in chunks)
    assert "".join(squeezed(c.text) for c in chunks) == squeezed("".join(s.text for s in sections))


# Sentences


@given(SECTIONS)
def test_pieces_and_their_separators_are_the_text(sections):
    pieces = pieces_of(sections)
    for number, section in enumerate(sections):
        own = [p for p in pieces if p.section == number]
        assert "".join(p.separator + p.text for p in own).strip() == section.text.strip()
        assert all(p.text == p.text.strip() and p.text for p in own)
        assert [p.border is Border.SECTION for p in own] == [i == 0 for i in range(len(own))]


@given(st.text(min_size=2).map(str.strip).filter(lambda t: len(t) >= 2))
def test_the_halves_of_a_piece_are_the_piece(text):
    first, second = split_piece(Piece(text, Border.SECTION, "", 0))
    assert first.text + second.separator + second.text == text
    assert first.text and second.text


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two! Three? Four", 4),
        ('He said "yes." Then (no.) Then more.', 3),
        ("Mr. X. Y. Zed of St. Ives, e.g. here. End.", 2),
        ("Version 1.5 of a.b.c is out. and more", 1),
        ("一つ。二つ！三つ", 3),
    ],
)
def test_sentences_end_where_a_reader_says(text, sentences):
    assert len(pieces_of([Section("", text)])) == sentences


# Cost


class CountingEncoder:
    fingerprint = "counting"

    def __init__(self, inner):
        self.inner, self.num_chars = inner, 0

    def encode(self, title, text):
        self.num_chars += len(text)
        return self.inner.encode(title, text)


@pytest.mark.parametrize("text", ["A sentence of words. " * 25_000, "word " * 100_000, "x" * 500_000])
def test_a_long_document_is_encoded_a_few_times_over_not_once_per_chunk(text, byte_encoder):
    encoder = CountingEncoder(byte_encoder)
    start = time.perf_counter()
    chunks = chunk_document(document(Section("", text)), encoder, ChunkingConfig(512))
    assert encoder.num_chars < 6 * len(text)
    assert len(chunks) < 2 * len(text) / 480
    assert time.perf_counter() - start < 20


def test_real_passages_are_cut_within_their_budget(shared_data, word_encoder):
    import json

    records = json.loads((shared_data / "wiki_passages.json").read_text())[:300]
    book = document(*(Section(r["title"], r["text"]) for r in records), title="Book")
    for tokens in (64, 512):
        chunks = chunk_document(book, word_encoder, ChunkingConfig(tokens))
        assert all(c.num_tokens <= tokens for c in chunks)
        words = [w for c in chunks for w in c.text.split()]
        assert is_subsequence([w for r in records for w in r["text"].split()], words)
        assert sum(c.num_tokens for c in chunks) / len(chunks) > 0.7 * tokens
