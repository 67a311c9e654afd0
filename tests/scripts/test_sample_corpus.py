"""The sample corpus of the demo: what its questions rely on holds in its files.

Reads the files as they lie in `scripts/sample/`, each format by its own few lines, so that a defect of the document
readers cannot hide one of the corpus. Knows nothing about the index, the language model or HTTP.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from bs4 import BeautifulSoup

from index.documents import read_documents

SAMPLE = Path(__file__).resolve().parents[2] / "scripts" / "sample"
MAX_PASSAGE_TOKENS = 256  # what the reader was trained on
TOKENS_PER_WORD = 1.6


@dataclass(frozen=True)
class Passage:
    title: str
    text: str
    file: str


@dataclass(frozen=True)
class Question:
    question: str
    answers: tuple[str, ...]
    type: str
    gold: tuple[str, ...]


def one_line(text: str) -> str:
    return " ".join(text.split())


def titled_blocks(path: Path) -> list[tuple[str, str]]:
    """(title, text) of every passage of one file, titles without text of their own included with ''."""
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        records = [json.loads(line) for line in source.splitlines()]
        assert all(set(record) == {"id", "title", "text"} for record in records)
        return [(record["title"], record["text"]) for record in records]
    if path.suffix == ".md":
        return [tuple(block.split("\n", 1)) for block in re.split(r"^#+ ", source, flags=re.MULTILINE)[1:]]
    if path.suffix == ".html":
        page = BeautifulSoup(source, "lxml")
        return [(h.get_text(), text_after(h)) for h in page.find_all(["h1", "h2"])]
    if path.suffix == ".txt":
        return [tuple(source.split("\n", 1))]
    raise AssertionError(f"{path.name}: a format that the sample does not use")


def text_after(heading) -> str:
    """The paragraph right behind an HTML heading, else ''."""
    following = heading.find_next_sibling()
    return following.get_text() if following is not None and following.name == "p" else ""


@pytest.fixture(scope="module")
def passages() -> list[Passage]:
    files = sorted((SAMPLE / "corpus").iterdir())
    blocks = [(title, one_line(text), file.name) for file in files for title, text in titled_blocks(file)]
    return [Passage(one_line(title), text, file) for title, text, file in blocks if text]


@pytest.fixture(scope="module")
def by_title(passages: list[Passage]) -> dict[str, str]:
    return {passage.title: passage.text for passage in passages}


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    records = [json.loads(line) for line in (SAMPLE / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
    return [Question(r["question"], tuple(r["answers"]), r["type"], tuple(r["gold"])) for r in records]


def test_corpus_is_large_enough_and_uses_every_plain_format(passages):
    assert len(passages) >= 72
    by_suffix = Counter(Path(passage.file).suffix for passage in passages)
    assert by_suffix[".jsonl"] >= 55
    assert Counter(f.suffix for f in (SAMPLE / "corpus").iterdir()) == {".jsonl": 1, ".md": 6, ".html": 2, ".txt": 2}


def test_ingest_reads_every_passage_in_full(passages):
    files = sorted((SAMPLE / "corpus").iterdir())
    ingested = " ".join(one_line(document.text) for file in files for document in read_documents(file))
    assert [passage.title for passage in passages if passage.text not in ingested] == []


def test_record_ids_are_unique():
    lines = (SAMPLE / "corpus" / "encyclopedia.jsonl").read_text(encoding="utf-8").splitlines()
    ids = [json.loads(line)["id"] for line in lines]
    assert len(ids) == len(set(ids))


def test_titles_are_unique_and_no_text_is_duplicated(passages):
    assert [title for title, n in Counter(p.title for p in passages).items() if n > 1] == []
    assert [text for text, n in Counter(p.text for p in passages).items() if n > 1] == []


def test_every_passage_is_a_short_encyclopedia_entry_that_fits_the_reader(passages):
    for passage in passages:
        num_words = len(passage.text.split())
        assert 60 <= num_words <= 110, (passage.title, num_words)
        assert len(f"{passage.title}: {passage.text}".split()) * TOKENS_PER_WORD <= MAX_PASSAGE_TOKENS, passage.title


def test_every_passage_is_about_its_title(passages):
    for passage in passages:
        assert passage.title in passage.text[: len(passage.title) + 5], passage.title


def test_questions_are_unique_and_of_both_types(questions):
    assert len({q.question for q in questions}) == len(questions) >= 24
    by_type = Counter(q.type for q in questions)
    assert set(by_type) == {"bridge", "single"}
    assert by_type["bridge"] >= 16
    assert by_type["single"] >= 8


def test_every_gold_title_exists(questions, by_title):
    assert {title for q in questions for title in q.gold} <= set(by_title)


def test_every_answer_occurs_in_the_last_gold_passage(questions, by_title):
    for q in questions:
        assert q.answers, q.question
        assert all(answer in by_title[q.gold[-1]] for answer in q.answers), q.question


def test_single_questions_have_one_gold_passage_which_they_name(questions):
    for q in questions:
        if q.type == "single":
            assert len(q.gold) == 1
            assert q.gold[0] in q.question


def test_bridge_questions_need_both_passages_in_order(questions, by_title):
    """The question names the first passage, the first names the second, and only the second holds the answer."""
    for q in questions:
        if q.type == "bridge":
            first, second = q.gold
            assert first in q.question, q.question
            assert second not in q.question, q.question
            assert second in by_title[first], q.question
            assert all(answer not in f"{first}: {by_title[first]}" for answer in q.answers), q.question


def test_no_bridge_question_is_answered_by_its_second_passage_alone(questions, by_title):
    """The answer passage does not name what the question asks about; married couples name each other and are left."""
    for q in questions:
        if q.type == "bridge" and "husband" not in q.question:
            assert q.gold[0] not in by_title[q.gold[1]], q.question
