"""Drills: short contexts in which every question is a step towards comparing the dates of two passages.

A comparison asks for two dates at once, neither of which is said, and a model that does neither step learns nothing
from being told that it was wrong. Here a step stands alone: the years are given, or one year is asked for, or two
passages stand against one year. Knows nothing about tokens. Invariants: the answer is one of the two names in the
question, or 'yes' or 'no', as often one as the other; of two names either may come first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from scripts.reader.comparisons import BY_DATE, comparable_dates, date_key
from scripts.reader.natural import sentences_of
from scripts.reader.passages import Passage, Question

ATTRIBUTES = {"birth": 0.4, "death": 0.2, "year": 0.3, "released": 0.05, "founded": 0.05}
NUM_PASSAGES = (2, 2, 3, 3, 4, 5)
SHORTENED_SHARE = 0.6
MAX_QUESTIONS = 12
STEP, COMPARISON = "step", "short comparison"

_IN_YEAR = {
    "birth": ("Who was born in {year}, {a} or {b}?", "Which of {a} and {b} was born in {year}?"),
    "death": ("Who died in {year}, {a} or {b}?", "Which of {a} and {b} died in {year}?"),
    "year": ("Which film is from {year}, {a} or {b}?", "Which film was released in {year}, {a} or {b}?"),
    "released": ("Which came out in {year}, {a} or {b}?", "Which was released in {year}, {a} or {b}?"),
    "founded": ("Which was founded in {year}, {a} or {b}?", "Which of {a} and {b} was established in {year}?"),
}
_BESIDE_YEAR = {
    "birth": "Who was born {side} {year}, {a} or {b}?",
    "death": "Who died {side} {year}, {a} or {b}?",
    "year": "Which film was released {side} {year}, {a} or {b}?",
    "released": "Which came out {side} {year}, {a} or {b}?",
    "founded": "Which was founded {side} {year}, {a} or {b}?",
}
_IS_BESIDE_YEAR = {
    "birth": "Was {a} born {side} {year}?",
    "death": "Did {a} die {side} {year}?",
    "year": "Was {a} released {side} {year}?",
    "released": "Did {a} come out {side} {year}?",
    "founded": "Was {a} founded {side} {year}?",
}


def pick_attribute(rng: Random) -> str:
    return rng.choices(list(ATTRIBUTES), list(ATTRIBUTES.values()))[0]


def shortened(passage: Passage, attribute: str) -> Passage:
    """The passage's first sentences, up to the one that says the attribute; other facts are dropped."""
    value, text = passage.facts[attribute], ""
    for sentence in sentences_of(passage):
        text = f"{text} {sentence}.".strip()
        if value in text:
            return Passage(passage.title, text, passage.kind, {attribute: value})
    return passage


def ask_steps(passages: Sequence[Passage], attribute: str, rng: Random) -> list[Question]:
    """Up to `MAX_QUESTIONS`, all different, about pairs of passages that both have the attribute."""
    found: dict[str, Question] = {}
    wanted = min(MAX_QUESTIONS, 3 * len(passages) * (len(passages) - 1) // 2)
    for _ in range(2 * wanted):
        a, b = rng.sample(passages, 2)
        ask = rng.choices([step for step, _ in STEPS], [weight for _, weight in STEPS])[0]
        question = ask(a, b, attribute, rng)
        if question and len(found) < wanted:
            found.setdefault(question.text, question)
    return list(found.values())


def _days(a: Passage, b: Passage, attribute: str) -> tuple[tuple[int, int, int], tuple[int, int, int]] | None:
    days = date_key(a.facts[attribute]), date_key(b.facts[attribute])
    return days if comparable_dates(*days) else None


def _compare(a: Passage, b: Passage, attribute: str, rng: Random) -> Question | None:
    """The comparison itself."""
    if not (days := _days(a, b, attribute)):
        return None
    template, earlier = rng.choice(BY_DATE[attribute])
    winner = a if (days[0] < days[1]) == earlier else b
    return Question(template.format(a=a.name, b=b.name), winner.name, COMPARISON)


def _compare_given(a: Passage, b: Passage, attribute: str, rng: Random) -> Question | None:
    """The question says the years."""
    days = _days(a, b, attribute)
    if not days or days[0][0] == days[1][0]:
        return None
    template, earlier = rng.choice(BY_DATE[attribute])
    winner = a if (days[0] < days[1]) == earlier else b
    names = [f"{passage.name} ({day[0]})" for passage, day in zip((a, b), days, strict=True)]
    return Question(template.format(a=names[0], b=names[1]), winner.name, STEP)


def _in_year(a: Passage, b: Passage, attribute: str, rng: Random) -> Question | None:
    """Which of them is of this year."""
    days = _days(a, b, attribute)
    if not days or days[0][0] == days[1][0]:
        return None
    place = rng.randrange(2)
    text = rng.choice(_IN_YEAR[attribute]).format(a=a.name, b=b.name, year=days[place][0])
    return Question(text, (a, b)[place].name, STEP)


def _beside_year(a: Passage, b: Passage, attribute: str, rng: Random) -> Question | None:
    """Which of them is on this side of a year between theirs."""
    days = _days(a, b, attribute)
    if not days or abs(days[0][0] - days[1][0]) < 2:
        return None
    before = rng.random() < 0.5
    low, high = sorted(day[0] for day in days)
    winner = a if (days[0] < days[1]) == before else b
    text = _BESIDE_YEAR[attribute].format(
        a=a.name, b=b.name, side="before" if before else "after", year=rng.randint(low + 1, high - 1)
    )
    return Question(text, winner.name, STEP)


def _is_beside_year(a: Passage, _: Passage, attribute: str, rng: Random) -> Question | None:
    """Whether one passage is on this side of a year."""
    own = date_key(a.facts[attribute])[0]
    if not own:
        return None
    before, yes = rng.random() < 0.5, rng.random() < 0.5
    distance = round(1 + rng.expovariate(1 / 30))
    text = _IS_BESIDE_YEAR[attribute].format(
        a=a.name, side="before" if before else "after", year=own + (distance if before == yes else -distance)
    )
    return Question(text, "yes" if yes else "no", STEP)


STEPS: tuple[tuple[Callable[[Passage, Passage, str, Random], Question | None], float], ...] = (
    (_compare, 0.45),
    (_compare_given, 0.15),
    (_in_year, 0.15),
    (_beside_year, 0.15),
    (_is_beside_year, 0.1),
)
