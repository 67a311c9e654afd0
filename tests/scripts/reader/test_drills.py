"""Drills: every step's answer follows from the dates in the passages, whatever the wording."""

from __future__ import annotations

import re
from collections import Counter
from random import Random

import pytest

from scripts.reader.comparisons import date_key
from scripts.reader.config import ContextConfig
from scripts.reader.contexts import Composer
from scripts.reader.drills import COMPARISON, MAX_QUESTIONS, shortened
from scripts.reader.facts import with_facts
from scripts.reader.passages import Passage, Question


@pytest.fixture
def drills(corpus):
    composer, rng = Composer(corpus, ContextConfig()), Random(0)
    return [drill for _ in range(200) if (drill := composer.drill(rng))]


def right_answers(question: Question, passages: tuple[Passage, ...]) -> set[str]:
    """Worked out from the question's words alone, its years and those of the passages."""
    dates = {p.name: next(date_key(p.facts[a]) for a in p.facts) for p in passages}
    asked = {name: date for name, date in dates.items() if name in question.text}
    text = re.sub(r"\(\d+\)", "", question.text)
    if match := re.search(r"(before|after|in|from) (\d{4})\b", text):
        year, side = int(match[2]), match[1]
        fits = {
            name
            for name, (own, _, _) in asked.items()
            if (own < year if side == "before" else own > year if side == "after" else own == year)
        }
        return fits if len(asked) == 2 else {"yes" if fits else "no"}
    later = re.search(r"later|younger|recently", text)
    return {(max if later else min)(asked, key=lambda name: asked[name])}


def test_every_answer_follows_from_the_dates(drills):
    alone = [d for d in drills if all(len(p.facts) == 1 for p in d.passages)]
    assert len(alone) > 5
    for drill in alone:
        for question in drill.questions:
            assert right_answers(question, drill.passages) == {question.answer}, question


def test_neither_place_nor_habit_gives_the_answer_away(drills):
    questions = [q for d in drills for q in d.questions]
    assert {q.kind for q in questions} == {"step", COMPARISON} and max(
        len(d.questions) for d in drills
    ) <= MAX_QUESTIONS
    first = [q.text.find(q.answer) < len(q.text) / 2 for q in questions if q.kind == COMPARISON]
    assert 0.4 < sum(first) / len(first) < 0.6
    said = Counter(q.answer for q in questions if q.answer in ("yes", "no"))
    assert 0.6 < said["yes"] / said["no"] < 1.6


def test_a_shortened_passage_still_says_the_fact(corpus):
    for passage in corpus.passages:
        for attribute in passage.facts:
            short = shortened(passage, attribute)
            assert short.facts[attribute] in short.text and len(short.text) <= len(passage.text) + 1
    assert "mill" not in shortened(with_facts(corpus.passages[0]), "birth").text
