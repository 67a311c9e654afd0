"""`evaluate retrieval`: recall and rank as defined, gold as marked or told by the answer, halves always alike."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from index import ScoredChunk
from index.config import ChunkingConfig, SearchConfig, VectorIndexConfig
from index.types import Chunk
from scripts.cli import main
from scripts.evaluation.datasets import Example, Passage
from scripts.evaluation.retrieval import (
    Asked,
    ask_all,
    first_half,
    format_rows,
    gold_passages,
    passage_ids,
    pooled,
    summarise,
)

PASSAGES = tuple(
    Passage(f"T{i}", f"The fact numbered {word}.") for i, word in enumerate(["one", "two", "three", "four", "five"])
)


def example(name: str, gold: tuple[int, ...] = (), answers: tuple[str, ...] = ("nothing",)) -> Example:
    return Example(name, f"question {name}", answers, PASSAGES, "", gold)


class Scripted:
    """Finds the passages that the last word of the question lists, best first, e.g. 'question 310'."""

    def search(self, collection, question, search, filter=None):
        ids = [int(digit) for digit in question.split()[-1]]
        return [ScoredChunk(Chunk("", "", (i,), str(i), 0), 0.5, "") for i in ids][: search.top_k]


def test_recall_counts_gold_passages_among_the_first_hits_and_mrr_the_first_of_them():
    asked = ask_all(
        Scripted(), [example("310", (0, 1)), example("42", (0,)), example("2", (2,))], SearchConfig(), (1, 2, 3)
    )
    assert [a.recalls for a in asked] == [(0, 0.5, 1), (0, 0, 0), (1, 1, 1)]
    assert [a.reciprocal_rank for a in asked] == [0.5, 0, 1]


def test_two_chunks_of_one_passage_are_one_passage_found():
    (asked,) = ask_all(Scripted(), [example("1120", (1, 2))], SearchConfig(), (2, 3))
    assert asked.recalls == (0.5, 1)


def test_gold_is_what_the_dataset_marks_else_what_holds_an_answer_else_the_question_is_left_out():
    assert gold_passages(example("a", gold=(3,), answers=("two",))) == (PASSAGES[3],)
    assert gold_passages(example("a", answers=("Two", "five"))) == (PASSAGES[1], PASSAGES[4])
    assert gold_passages(example("a")) == ()
    assert ask_all(Scripted(), [example("0")], SearchConfig(), (5,)) == []


def test_equal_passages_of_different_questions_are_pooled_once():
    both = [example("a"), Example("b", "q", ("x",), (PASSAGES[2], Passage("new", "new")))]
    assert list(passage_ids(both).values()) == ["0", "1", "2", "3", "4", "5"]
    assert passage_ids(both)[PASSAGES[2]] == "2"


def test_the_first_half_is_drawn_alike_and_the_rows_cover_every_question_once():
    examples = [example(f"{i}", (0,)) for i in range(9)]
    first = first_half(examples)
    assert len(first) == 4 and first == first_half(examples) and first != {e.example_id for e in examples[:4]}
    asked = [Asked(e.example_id, (float(e.example_id in first),), 1.0, 2.0) for e in examples]
    rows = summarise("dense", asked, (5,), first)
    assert [(r.part, r.n, r.recalls[0]) for r in rows] == [
        ("first half", 4, 100.0),
        ("second half", 5, 0.0),
        ("all", 9, pytest.approx(400 / 9)),
    ]
    lines = format_rows(rows).splitlines()
    assert lines[0].split() == ["mode", "questions", "recall@5", "MRR", "ms_p50", "n"]
    assert lines[3].split() == ["dense", "all", "44.4", "1.000", "2.0", "9"]


class WordHashes:
    """One token per word."""

    fingerprint = "words"

    def encode(self, title, text):
        import zlib

        return [zlib.crc32(word.encode()) & 0xFFFF for word in re.findall(r"\w+", f"{title} {text}")]


def test_a_passage_longer_than_a_chunk_is_found_by_any_of_its_chunks(minilm):
    long = Passage(
        "Birds", " ".join(f"Fact {i} is dull." for i in range(60)) + " The emperor penguin breeds in winter."
    )
    examples = [Example("q", "When does the emperor penguin breed?", ("winter",), (Passage("Rocks", "Granite."), long))]
    chunking = ChunkingConfig(chunk_tokens=64)
    with pooled(examples, WordHashes(), minilm, chunking, VectorIndexConfig()) as retriever:
        for mode in ("dense", "lexical", "hybrid"):
            (asked,) = ask_all(retriever, examples, SearchConfig(search_mode=mode), (1,))
            assert asked.recalls == (1.0,)


@pytest.fixture(scope="session")
def minilm():
    from index import Embedder, EmbeddingConfig

    return Embedder(EmbeddingConfig())


@pytest.fixture
def dataset(tmp_path) -> Path:
    names = ["penguin", "zebra", "granite", "harbour", "violin", "comet"]
    ctxs = [{"title": "", "text": f"All that is known of the {name} stands here."} for name in names]
    records = [
        {"question": f"What of the {name}?", "answers": [name], "ctxs": ctxs, "gold": [i]}
        for i, name in enumerate(names)
    ]
    path = tmp_path / "questions.json"
    path.write_text(json.dumps([*records, {"question": "And?", "answers": ["nowhere"], "ctxs": ctxs}]))
    return path


def test_the_command_prints_every_mode_and_writes_the_rows(dataset, tiny_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FUSIONRAG_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "out.json"
    args = ["evaluate", "retrieval", "--dataset", dataset, "--ks", "1,3", "--model", tiny_model, "--json", out]
    for _ in range(2):  # the second time with vectors from the cache
        assert main([str(a) for a in args]) == 0
        result = json.loads(out.read_text())
        assert result["command"] == "evaluate retrieval" and result["args"]["max_similarity"] == 0.98
        every = [row for row in result["rows"] if row["part"] == "all"]
        assert [row["search_mode"] for row in every] == ["dense", "lexical", "hybrid"]
        for row in every:
            assert row["n"] == 6 and row["recall_at_1"] == row["recall_at_3"] == 100 and row["mrr"] == 1
    printed = capsys.readouterr().out
    assert "recall@3" in printed and "marked for 6 questions" in printed and "1 without are left out" in printed
    assert len(list((tmp_path / "cache" / "embeddings").iterdir())) == 1


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--ks", "0"], "ks"),
        (["--ks", "five"], "ks"),
        (["--modes", "dense,fuzzy"], "search_mode"),
        (["--limit", "0"], "limit"),
        (["--reranker", "/no/such/model"], "/no/such/model"),
    ],
)
def test_bad_arguments_are_refused_by_name(dataset, tiny_model, capsys, args, named):
    assert main(["evaluate", "retrieval", "--dataset", str(dataset), "--model", str(tiny_model), *args]) == 2
    assert named in capsys.readouterr().err


def test_a_dataset_must_be_named(capsys):
    assert main(["evaluate"]) == 2
    assert main(["evaluate", "retrieval"]) == 2
    assert capsys.readouterr().err.count("dataset") >= 2
