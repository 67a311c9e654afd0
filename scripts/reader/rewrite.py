"""Counterfactual copies of passages: other years, other people, other numbers, so that an answer must be read.

Knows nothing about questions' wording. Invariant: a copy's facts stand verbatim in the copy's text, as in the original.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from random import Random

from scripts.reader.passages import HumanQuestion, Passage
from scripts.reader.patterns import FULL_NAME, YEAR

FIRST_YEAR, LAST_YEAR = 1000, 2023
MIN_SUBSTITUTES = 20
_YEAR = re.compile(rf"\b(?<![\d,.]){YEAR}(?![,.]\d)")
_NUMBER = re.compile(r"(?<![\w.,])\d{1,3}(?:,\d{3})+(?![\w,])|(?<![\w.,])\d{2,3}(?![\w,.])")
_PERSON = re.compile(FULL_NAME)


def shift_years(text: str, offset: int) -> str:
    """Every year moved by the same number of years, so that spans of time stay what they were."""
    return _YEAR.sub(lambda match: str(int(match.group(0)) + offset), text)


def year_offset(passage: Passage, rng: Random, largest: int = 90) -> int:
    """A random shift that keeps all years of the passage in the past; 0 if its very name holds a number."""
    years = [int(year) for year in _YEAR.findall(f"{passage.title} {passage.text}")]
    if not years or re.search(r"\d", passage.name):
        return 0
    return rng.randint(max(-largest, FIRST_YEAR - min(years)), max(0, min(largest, LAST_YEAR - max(years))))


def latest_year(passage: Passage) -> int | None:
    """The last year that the passage names."""
    return max((int(year) for year in _YEAR.findall(passage.text)), default=None)


def offset_to(passage: Passage, latest: int) -> int:
    """The shift after which `latest` is the last year of the passage; 0 if its very name holds a number."""
    years = [int(year) for year in _YEAR.findall(f"{passage.title} {passage.text}")]
    if not years or re.search(r"\d", passage.name):
        return 0
    return max(min(latest, LAST_YEAR) - max(years), FIRST_YEAR - min(years))


def in_other_years(passage: Passage, offset: int) -> Passage:
    """The passage as if everything in it had happened `offset` years later."""
    if not offset:
        return passage
    facts = {key: shift_years(value, offset) for key, value in passage.facts.items()}
    return replace(
        passage, title=shift_years(passage.title, offset), text=shift_years(passage.text, offset), facts=facts
    )


def with_person(passage: Passage, relation: str, name: str) -> Passage:
    """The passage with another person in the place of its `relation`, wherever the old name stands."""
    old = passage.facts[relation]
    facts = {key: value.replace(old, name) for key, value in passage.facts.items()}
    return replace(passage, text=passage.text.replace(old, name), facts=facts)


def substitutes(questions: Sequence[HumanQuestion], people: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """First word of a question → names that may stand for its answer: people for 'who', else what others ask for."""
    found: dict[str, list[str]] = {}
    for question in questions:
        if _is_name(question.answers[0]):
            found.setdefault(_first_word(question), []).append(question.answers[0])
    common = {word: tuple(answers) for word, answers in found.items() if len(answers) >= MIN_SUBSTITUTES}
    return {**common, "who": tuple(people)} if people else common


def _is_name(answer: str) -> bool:
    return answer[:1].isupper() and not re.search(r"\d", answer) and len(answer.split()) <= 5


def _first_word(question: HumanQuestion) -> str:
    return question.text.split()[0].lower()


def with_other_answer(question: HumanQuestion, others: Mapping[str, Sequence[str]], rng: Random) -> HumanQuestion:
    """The question with gold passages in which its answer is another of the same sort; itself where no rule fits."""
    answer = question.answers[0]
    if not any(answer in passage.text for passage in question.gold):
        return question
    if _YEAR.search(answer):
        offset = min((year_offset(p, rng) for p in question.gold), key=abs)
        gold = tuple(in_other_years(p, offset) for p in question.gold)
        return HumanQuestion(shift_years(question.text, offset), (shift_years(answer, offset),), gold)
    if match := _NUMBER.search(answer):
        return _replaced(question, answer, match.group(0), _other_number(match.group(0), rng))
    word = _first_word(question)
    if word in others and _is_name(answer) and (word != "who" or _PERSON.fullmatch(answer)):
        return _replaced(question, answer, answer, rng.choice(others[word]))
    return question


def _replaced(question: HumanQuestion, answer: str, old: str, new: str) -> HumanQuestion:
    pattern = re.compile(rf"(?<![\w.,]){re.escape(old)}(?!\w)")
    if pattern.search(question.text):  # the question itself says it; changing the passage alone would contradict it
        return question

    def changed(text: str) -> str:
        return pattern.sub(lambda _: new, text)

    gold = tuple(replace(p, title=changed(p.title), text=changed(p.text)) for p in question.gold)
    return HumanQuestion(question.text, (changed(answer),), gold)


def _other_number(number: str, rng: Random) -> str:
    """A number with as many digits, spelled alike."""
    digits = str(rng.randint(1, 9)) + "".join(str(rng.randint(0, 9)) for c in number[1:] if c != ",")
    return f"{int(digits):,}" if "," in number else digits
