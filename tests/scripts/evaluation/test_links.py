"""`evaluate links`: stored in either direction, or in order, only where full prefill would have seen it too."""

from __future__ import annotations

import json

from scripts.cli import main
from scripts.evaluation.datasets import Example, Passage
from scripts.evaluation.links import link_rows, two_step

FILM, PERSON, OTHER = Passage("Film", "Made by Rae."), Passage("Rae", "Born in 1900."), Passage("", "Nothing.")


def example(*passages: Passage, kind: str = "bridge") -> Example:
    gold = (passages.index(FILM), passages.index(PERSON))
    return Example("q", "When was the maker of Film born?", ("1900",), passages, kind, gold)


def test_a_pair_counts_in_either_direction_and_in_order_only_behind_what_stands_in_front():
    behind_film = {FILM: (), PERSON: (FILM,), OTHER: ()}
    for passages, in_order in (((FILM, OTHER, PERSON), 1.0), ((PERSON, OTHER, FILM), 0.0)):
        (row,) = link_rows([example(*passages)], {3: behind_film})
        assert (row.num_related, row.stored, row.in_order, row.n) == (3, 1.0, in_order, 1)
    (row,) = link_rows([example(FILM, PERSON)], {1: {FILM: (OTHER,), PERSON: (OTHER,)}})
    assert (row.stored, row.in_order) == (0.0, 0.0)


def test_only_questions_of_two_steps_count():
    assert two_step([example(FILM, PERSON), example(FILM, PERSON, kind="comparison")]) == [example(FILM, PERSON)]


def test_the_command_needs_no_model(tmp_path, capsys):
    passages = [{"title": p.title, "text": p.text} for p in (FILM, OTHER, PERSON)]
    passages += [{"title": f"Title{i}", "text": f"Words{i} of nothing."} for i in range(20)]
    question = {"question": "When?", "answers": ["1900"], "type": "bridge", "gold": [0, 2], "ctxs": passages}
    path = tmp_path / "questions.json"
    path.write_text(json.dumps([question]))
    args = ["evaluate", "links", "--dataset", str(path), "--related-by", "words", "--numbers", "1"]
    assert main(args) == 0
    assert capsys.readouterr().out.split()[-4:] == ["1", "100.0%", "100.0%", "1"]
    assert main([*args[:-1], "none"]) == 2
    path.write_text(json.dumps([{**question, "type": "single"}]))
    assert main(args) == 2
