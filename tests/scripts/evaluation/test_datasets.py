"""Every published form becomes the same `Example`; what is malformed is named by file, record and field."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from scripts.evaluation.datasets import HALVES, Example, Passage, hop_order, load_dataset
from scripts.evaluation.errors import DatasetError

SHARED_DATA = Path(__file__).resolve().parents[3].parent / "shared" / "data"

CACHEBLEND = {
    "ctxs": [
        {"title": "Mira Tolen", "text": "Mira Tolen (born 3 May 1921) was a director."},
        {"title": "The Salt Road", "text": "The Salt Road is a film by Mira Tolen."},
    ],
    "question": "When was the director of The Salt Road born?",
    "answers": ["3 May 1921"],
    "type": "bridge_director_birth",
    "gold": [0, 1],
}
LONGBENCH = {
    "input": "Who directed The Salt Road?",
    "context": "Passage 1:\nThe Salt Road\nA film.\nBy Mira Tolen.\n\nPassage 2:\nOne line, about Passage 3: nothing.",
    "answers": ["Mira Tolen"],
    "dataset": "hotpotqa",
    "_id": "0a1b",
}
HOTPOTQA = {
    "_id": "5a7a06935542990198eaf050",
    "question": "When was the director born?",
    "answer": "3 May 1921",
    "type": "bridge",
    "level": "hard",
    "supporting_facts": [["The Salt Road", 0], ["Mira Tolen", 0], ["The Salt Road", 1]],
    "context": [
        ["Mira Tolen", ["Mira Tolen was a director.", " She was born on 3 May 1921."]],
        ["Dun Lake", ["A lake."]],
        ["The Salt Road", ["A film.", "By Mira Tolen."]],
    ],
}


def squad(num_paragraphs: int = 14) -> dict[str, Any]:
    paragraphs = [
        {
            "context": f"Fact {i}.",
            "qas": [{"id": f"q{i}", "question": f"What {i}?", "answers": [{"text": f"Fact {i}"}]}],
        }
        for i in range(num_paragraphs)
    ]
    return {"version": "1.1", "data": [{"title": "Some_Facts", "paragraphs": paragraphs}]}


def load(tmp_path: Path, content: object, **arguments: Any) -> list[Example]:
    """Writes `content` (a str as it is, anything else as JSON) and loads it."""
    path = tmp_path / "set.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return load_dataset(path, **arguments)


def test_cacheblend_form_keeps_passages_type_and_gold_order(tmp_path: Path) -> None:
    (example,) = load(tmp_path, [CACHEBLEND | {"gold": [1, 0]}])
    assert example == Example(
        example_id="set-1",
        question="When was the director of The Salt Road born?",
        answers=("3 May 1921",),
        passages=(
            Passage("Mira Tolen", "Mira Tolen (born 3 May 1921) was a director."),
            Passage("The Salt Road", "The Salt Road is a film by Mira Tolen."),
        ),
        type="bridge_director_birth",
        gold=(1, 0),
    )


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ("one", ("one",)),
        (["one", " two ", "one", ""], ("one", "two")),
        ([["one"], ["two", ["three"]]], ("one", "two", "three")),
    ],
)
def test_cacheblend_answers_may_be_a_string_a_list_or_nested(
    tmp_path: Path, answers: object, expected: tuple[str, ...]
) -> None:
    (example,) = load(tmp_path, [CACHEBLEND | {"answers": answers}])
    assert example.answers == expected


def test_cacheblend_type_gold_and_titles_are_optional(tmp_path: Path) -> None:
    (example,) = load(tmp_path, [{"ctxs": [{"text": "a"}], "question": "q", "answers": "a"}])
    assert (example.type, example.gold, example.passages) == ("", (), (Passage("", "a"),))


def test_longbench_context_is_split_at_passage_headers_and_first_lines_are_titles(tmp_path: Path) -> None:
    (example,) = load(tmp_path, json.dumps(LONGBENCH) + "\n")
    assert example.passages == (
        Passage("The Salt Road", "A film.\nBy Mira Tolen."),
        Passage("", "One line, about Passage 3: nothing."),
    )
    assert (example.example_id, example.question, example.type) == ("0a1b", "Who directed The Salt Road?", "hotpotqa")


def test_jsonl_and_a_json_array_of_the_same_records_give_the_same_passages(tmp_path: Path) -> None:
    records = [LONGBENCH | {"_id": f"r{i}", "input": f"q\u2028{i}"} for i in range(3)]
    lines = "\n\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n"
    assert load(tmp_path, lines) == load(tmp_path, records)


def test_hotpotqa_sentences_are_joined_and_supporting_titles_become_gold_positions(tmp_path: Path) -> None:
    (example,) = load(tmp_path, [HOTPOTQA])
    assert example.passages[0] == Passage("Mira Tolen", "Mira Tolen was a director. She was born on 3 May 1921.")
    assert example.passages[2] == Passage("The Salt Road", "A film. By Mira Tolen.")
    assert example.gold == (2, 0)
    assert (example.example_id, example.answers, example.type) == (HOTPOTQA["_id"], ("3 May 1921",), "bridge")


def test_2wikimultihopqa_record_with_its_own_fields_loads_like_hotpotqa(tmp_path: Path) -> None:
    record = HOTPOTQA | {"type": "compositional", "evidences": [["The Salt Road", "director", "Mira Tolen"]]}
    (example,) = load(tmp_path, [record])
    assert (example.type, example.gold) == ("compositional", (2, 0))


def test_hotpotqa_supporting_passage_that_retrieval_missed_is_not_gold(tmp_path: Path) -> None:
    (example,) = load(tmp_path, [HOTPOTQA | {"supporting_facts": [["Elsewhere", 0], ["Mira Tolen", 0]]}])
    assert example.gold == (0,)


def test_squad_questions_get_their_paragraph_among_nine_distinct_others(tmp_path: Path) -> None:
    examples = load(tmp_path, squad())
    assert len(examples) == 14
    for i, example in enumerate(examples):
        assert len(set(example.passages)) == len(example.passages) == 10
        assert [example.passages[place] for place in example.gold] == [Passage("Some Facts", f"Fact {i}.")]
    assert len({example.gold for example in examples}) > 3, "the paragraph must not always stand at one place"


def test_squad_passages_depend_on_the_seed_and_on_nothing_else(tmp_path: Path) -> None:
    everything = load(tmp_path, squad(), seed=1)
    assert load(tmp_path, squad(), seed=1) == everything
    assert load(tmp_path, squad(), seed=2) != everything
    shuffled = squad()
    shuffled["data"][0]["paragraphs"][3]["qas"] = []
    assert load(tmp_path, shuffled, seed=1) == [e for e in everything if e.example_id != "q3"]


def test_squad_with_fewer_than_ten_paragraphs_shows_them_all(tmp_path: Path) -> None:
    assert [len(example.passages) for example in load(tmp_path, squad(2))] == [2, 2]


def test_squad_paragraph_that_occurs_twice_is_shown_once(tmp_path: Path) -> None:
    doubled = squad(5)
    doubled["data"].append({"title": "Again", "paragraphs": [{"context": "Fact 1.", "qas": []}]})
    assert all(Counter(p.text for p in e.passages).most_common(1)[0][1] == 1 for e in load(tmp_path, doubled))


def test_squad_unanswerable_questions_are_left_out(tmp_path: Path) -> None:
    content = squad(3)
    content["data"][0]["paragraphs"][1]["qas"][0] |= {"is_impossible": True, "answers": []}
    assert [example.example_id for example in load(tmp_path, content)] == ["q0", "q2"]


def test_limit_keeps_file_order_and_smaller_limits_are_subsets(tmp_path: Path) -> None:
    everything = load(tmp_path, squad())
    large, small = load(tmp_path, squad(), limit=8), load(tmp_path, squad(), limit=3)
    assert (len(large), len(small)) == (8, 3)
    assert set(small) < set(large) < set(everything)
    assert large == sorted(large, key=everything.index)
    assert load(tmp_path, squad(), limit=99) == everything


def test_halves_are_every_other_question_and_limits_are_drawn_within_them(tmp_path: Path) -> None:
    everything = load(tmp_path, squad())
    chosen, reported = (load(tmp_path, squad(), half=half) for half in HALVES)
    assert (chosen, reported) == (everything[::2], everything[1::2])
    assert set(load(tmp_path, squad(), limit=2, half="reporting")) < set(reported)


@pytest.mark.parametrize("limit", [0, -1])
def test_limit_below_one_is_refused(tmp_path: Path, limit: int) -> None:
    with pytest.raises(DatasetError, match="limit"):
        load(tmp_path, [CACHEBLEND], limit=limit)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (
            [CACHEBLEND, {"title": "t", "text": "x"}],
            r"record 2: unknown form, fields: text, title; known are CacheBlend",
        ),
        ([CACHEBLEND, 7], "record 2: must be an object, got a number"),
        ([CACHEBLEND | {"question": None}], "record 1: field 'question': must be a string, got null"),
        ([CACHEBLEND | {"question": "  "}], "record 1: field 'question': must not be empty"),
        ([CACHEBLEND | {"answers": [["a"], 3]}], r"record 1: field 'answers\[1\]': must be a string"),
        ([CACHEBLEND | {"answers": [[]]}], "record 1: field 'answers': must hold at least one string"),
        ([CACHEBLEND | {"ctxs": []}], "record 1: field 'ctxs': must not be empty"),
        ([CACHEBLEND | {"ctxs": "text"}], "record 1: field 'ctxs': must be a list, got a string"),
        ([CACHEBLEND | {"ctxs": ["text"]}], r"record 1: field 'ctxs\[0\]': must be an object, got a string"),
        ([CACHEBLEND | {"ctxs": [{"title": "t"}]}], r"record 1: field 'ctxs\[0\].text': is missing; must be a string"),
        ([CACHEBLEND | {"gold": [2]}], r"record 1: field 'gold': must be a list of positions in ctxs \(0 to 1\)"),
        ([LONGBENCH | {"context": "no headers"}], "record 1: field 'context': must start with a line 'Passage 1:'"),
        ([LONGBENCH | {"context": "Lost.\nPassage 1:\nT\nx"}], "record 1: field 'context': must start with"),
        ([HOTPOTQA | {"context": [["Title", "no list"]]}], r"record 1: field 'context\[0\]': must be \[title"),
        ([HOTPOTQA | {"supporting_facts": ["x"]}], r"record 1: field 'supporting_facts\[0\]': must be \[title"),
        ([{k: v for k, v in HOTPOTQA.items() if k != "answer"}], "record 1: field 'answer': must be a string"),
        ({"data": [{"title": "t"}]}, r"record 1: field 'data\[0\].paragraphs': is missing"),
        ({"data": [{"paragraphs": [{"context": "c"}]}]}, r"field 'data\[0\].paragraphs\[0\].qas': is missing"),
        ({"data": [{"paragraphs": [{"context": "c", "qas": []}]}]}, "holds no questions"),
        ([], "holds no questions"),
        ([HOTPOTQA, HOTPOTQA], "field 'id': '5a7a06935542990198eaf050' names two questions"),
        ("", "is empty"),
        (json.dumps(LONGBENCH) + "\n{broken\n", "record 2: malformed JSON: .* at column 2"),
        ('[\n{"ctxs": [}\n]', "malformed JSON: .* at line 2, column 11"),
        ("just text", "malformed JSON: .* at line 1, column 1"),
    ],
)
def test_malformed_data_is_named_by_file_record_and_field(tmp_path: Path, content: object, complaint: str) -> None:
    with pytest.raises(ValueError, match=r"set\.json: .*" + complaint) as caught:
        load(tmp_path, content)
    assert isinstance(caught.value, DatasetError)


def test_unreadable_files_are_dataset_errors(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"absent\.json: cannot be read: No such file"):
        load_dataset(tmp_path / "absent.json")
    (tmp_path / "latin.json").write_bytes(b'["caf\xe9"]')
    with pytest.raises(DatasetError, match=r"latin\.json: is not UTF-8 text \(byte 5\)"):
        load_dataset(tmp_path / "latin.json")


def chain(
    texts: list[str], gold: tuple[int, ...], answers: tuple[str, ...] = ("3 May",), type: str = "bridge"
) -> Example:
    return Example("x", "q", answers, tuple(Passage("", text) for text in texts), type, gold)


@pytest.mark.parametrize("gold", [(0, 2), (2, 0)])
def test_hop_order_is_where_the_answer_stands_whatever_the_order_of_gold(gold: tuple[int, ...]) -> None:
    assert hop_order(chain(["The film, by Mira.", "3 May", "Mira, born 3 May."], gold)) == "before"
    assert hop_order(chain(["Mira, born 3 May.", "3 May", "The film, by Mira."], gold)) == "after"


@pytest.mark.parametrize(
    "example",
    [
        chain(["3 May", "3 May"], (0, 1)),
        chain(["a", "b"], (0, 1)),
        chain(["13 May", "b"], (0, 1)),
        chain(["3 May"], (0,)),
        chain(["3 May", "b"], (0, 1), type="comparison"),
        chain(["3 May", "b"], (0, 1), type="bridge_comparison"),
        chain(["3 May", "b"], (0, 1), type="single"),
    ],
    ids=["both", "neither", "part of a word", "one gold", "comparison", "bridge comparison", "single"],
)
def test_hop_order_is_none_where_it_is_not_certain(example: Example) -> None:
    assert hop_order(example) is None


@pytest.mark.parametrize(
    ("name", "num_examples", "num_passages"),
    [("eval_wiki.json", 140, {14}), ("musique_75.json", 75, {10}), ("xquad_en.json", 803, {10})],
)
def test_real_files_load_whole(name: str, num_examples: int, num_passages: set[int]) -> None:
    if not (SHARED_DATA / name).exists():
        pytest.skip(f"the evaluation data {name} is not on this machine")
    examples = load_dataset(SHARED_DATA / name)
    assert len(examples) == len({example.example_id for example in examples}) == num_examples
    assert {len(example.passages) for example in examples} == num_passages
    assert all(passage.text for example in examples for passage in example.passages)


def test_real_bridge_questions_have_both_hop_orders() -> None:
    """`gold` is ascending in this file: read as a reading order it would call every question 'before'."""
    if not (SHARED_DATA / "eval_wiki.json").exists():
        pytest.skip("the evaluation data eval_wiki.json is not on this machine")
    bridges = [e for e in load_dataset(SHARED_DATA / "eval_wiki.json") if e.type.startswith("bridge")]
    assert Counter(map(hop_order, bridges)) == {"before": 41, "after": 50, None: 6}
