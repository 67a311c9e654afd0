"""Facts, questions and counterfactual copies: what every one of them must satisfy, on the whole small corpus."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from scripts.reader.asking import ask_bridge, ask_fact
from scripts.reader.comparisons import BY_DATE, BY_PERSON, EARLIER, comparable_dates, compare, date_key
from scripts.reader.facts import find_links, gender, with_facts
from scripts.reader.natural import ask_sentence
from scripts.reader.passages import HumanQuestion, Passage
from scripts.reader.rewrite import (
    MIN_SUBSTITUTES,
    in_other_years,
    shift_years,
    substitutes,
    with_other_answer,
    with_person,
    year_offset,
)


def test_facts_of_a_person_and_a_film(corpus):
    person, film = corpus.passages[0], corpus.passages[1]
    assert person.kind == "person" and person.facts == {
        "birth": "3 May 1901",
        "birthplace": "Kellburg",
        "death": "7 June 1960",
        "nationality": "Swedish",
        "occupation": "film director",
    }
    assert film.name == "The Brell Affair" and film.kind == "film"
    assert film.facts == {"year": "1930", "country": "Swedish", "director": "Anna Brell", "star": "Lea Moss"}


def test_links_lead_from_films_to_their_directors(corpus):
    assert {(link.source.name, link.relation, link.target.name) for link in corpus.links} >= {
        ("The Brell Affair", "director", "Anna Brell"),
        ("The Hale Affair", "director", "Viktor Hale"),
    }


def test_pronouns_tell_the_gender(corpus):
    assert gender(corpus.passages[0]) == "female" and gender(corpus.passages[2]) == "male"
    assert gender(Passage("Stone", "A stone lies here and says nothing.")) == ""


@pytest.mark.parametrize("offset", [-80, -1, 1, 57])
def test_a_passage_moved_in_time_has_the_facts_of_its_own_text(corpus, offset):
    for passage in corpus.passages:
        moved = in_other_years(passage, offset)
        assert with_facts(Passage(moved.title, moved.text)).facts == moved.facts


def test_years_are_moved_and_other_numbers_are_not():
    assert shift_years("In 1901 he paid 1,900 for 1950.5 and 120 boats of 1999.", 10) == (
        "In 1911 he paid 1,900 for 1950.5 and 120 boats of 2009."
    )


def test_no_year_is_moved_into_the_future_and_no_name_is_changed(corpus):
    rng = Random(0)
    for passage in corpus.passages:
        for _ in range(20):
            moved = in_other_years(passage, year_offset(passage, rng))
            assert "202" not in moved.text.replace("2020", "").replace("2021", "") or year_offset(passage, rng) <= 90
            assert moved.name == passage.name
    assert year_offset(Passage("2017 season", "The 2017 season began in 2017."), rng) == 0


def test_another_person_takes_the_place_of_the_old_one_everywhere(corpus):
    copy = with_person(corpus.passages[1], "director", "Pavel Marek")
    assert "Anna Brell" not in copy.text and copy.facts["director"] == "Pavel Marek"
    assert find_links([copy, corpus.passages[10]])[0].target.name == "Pavel Marek"


def test_a_human_question_keeps_its_words_and_gets_an_answer_that_its_passage_gives(human):
    rng, answers = Random(0), Counter()
    for question in human * 10:
        changed = with_other_answer(question, {"who": ["Pavel Marek", "Rosa Orsini"]}, rng)
        assert changed.text == question.text
        assert changed.answers[0] in changed.gold[0].text
        answers[changed.answers[0] == question.answers[0]] += 1
    assert answers[False] > 20  # chance may draw the old year or number again


def test_substitutes_are_people_for_who_and_else_answers_to_such_questions(human):
    where = [HumanQuestion("Where is it?", (name,), human[0].gold) for name in ("Kell", "in Lum", "Route 7")]
    assert substitutes(where * MIN_SUBSTITUTES, ["Pavel Marek"]) == {
        "where": ("Kell",) * MIN_SUBSTITUTES,
        "who": ("Pavel Marek",),
    }


def test_an_answer_stands_in_the_passage_and_of_two_hops_only_in_the_second(corpus):
    rng = Random(0)
    for passage in corpus.passages:
        for _ in range(10):
            question = ask_fact(passage, rng)
            if question:
                assert question.answer in passage.text and passage.name in question.text
    for link in corpus.links:
        for _ in range(20):
            question = ask_bridge(link, rng)
            assert question.answer in link.target.text and link.target.name not in question.text
            if question.answer not in ("Swedish", "Polish", "Italian", "Danish", "Welsh", "film director"):
                assert question.answer not in link.source.text


def test_comparisons_are_right_and_balanced(corpus):
    rng, seen = Random(0), Counter()
    by_name = {p.name: p for p in corpus.passages}
    for _ in range(2000):
        question = compare(corpus.passages, corpus.links, rng)
        if question and question.answer in by_name:
            check_order(question, by_name, seen)
        elif question:
            seen[question.answer] += 1
    assert 0.45 < seen["first named"] / (seen["first named"] + seen["second named"]) < 0.55
    assert 0.4 < seen["yes"] / (seen["yes"] + seen["no"]) < 0.6
    assert seen["checked"] > 500


def check_order(question, by_name, seen) -> None:
    """The answer, derived again from the template and the facts."""
    sides = sorted((name for name in by_name if name in question.text), key=question.text.index)
    seen["first named" if question.answer == sides[0] else "second named"] += 1
    for attribute, templates in [*BY_DATE.items(), *BY_PERSON.items()]:
        for template, earlier in templates:
            for a, b in (sides, sides[::-1]):
                if template.format(a=a, b=b, kind="film", role="director") == question.text:
                    keys = {name: date_key(fact_of(by_name, name, attribute)) for name in (a, b)}
                    wanted = min if earlier is EARLIER else max
                    assert question.answer == wanted(keys, key=keys.__getitem__), question
                    seen["checked"] += 1
                    return


def fact_of(by_name, name, attribute):
    facts = by_name[name].facts
    return facts[attribute] if attribute in facts else by_name[facts["director"]].facts[attribute]


def test_dates_are_compared_only_where_the_order_is_sure():
    assert comparable_dates(date_key("3 May 1901"), date_key("May 4, 1901"))
    assert not comparable_dates(date_key("1901"), date_key("May 4, 1901"))
    assert not comparable_dates(date_key("1901"), date_key("1901"))
    assert date_key("4 May, 1901") == date_key("May 4, 1901") == (1901, 5, 4)


def test_questions_of_sentences_do_not_hold_their_answer(corpus):
    rng, kinds = Random(0), set()
    for passage in corpus.passages * 20:
        question = ask_sentence(passage, rng)
        if question:
            assert question.answer in passage.text and question.answer.lower() not in question.text.lower()
            assert question.text.endswith("?") and question.text[0].isupper()
            kinds.add(question.text.split()[0].lower())
    assert len(kinds) > 3
