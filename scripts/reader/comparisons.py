"""Questions that compare two passages, or two people whom links lead to: earlier or later, same or not.

Invariants: the answer is one of the two names in the question, 'yes', 'no', or what both share; the order of the names
is random, and 'yes' and 'no' are wanted equally often, so that neither place nor habit gives the answer away.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from scripts.reader.passages import Link, Passage, Question
from scripts.reader.patterns import MONTHS

EARLIER, LATER = True, False
BY_DATE: dict[str, tuple[tuple[str, bool], ...]] = {
    "birth": (
        ("Who was born first, {a} or {b}?", EARLIER),
        ("Who was born earlier, {a} or {b}?", EARLIER),
        ("Who is older, {a} or {b}?", EARLIER),
        ("Who was born first out of {a} and {b}?", EARLIER),
        ("Who was born later, {a} or {b}?", LATER),
        ("Who is younger, {a} or {b}?", LATER),
    ),
    "death": (
        ("Who died first, {a} or {b}?", EARLIER),
        ("Who died earlier, {a} or {b}?", EARLIER),
        ("Who died later, {a} or {b}?", LATER),
    ),
    "year": (
        ("Which film came out first, {a} or {b}?", EARLIER),
        ("Which film was released earlier, {a} or {b}?", EARLIER),
        ("Which film was released first, {a} or {b}?", EARLIER),
        ("Which movie is older, {a} or {b}?", EARLIER),
        ("Which film came out later, {a} or {b}?", LATER),
        ("Which film was released more recently, {a} or {b}?", LATER),
    ),
    "released": (
        ("Which came out first, {a} or {b}?", EARLIER),
        ("Which was released earlier, {a} or {b}?", EARLIER),
        ("Which was released later, {a} or {b}?", LATER),
    ),
    "founded": (
        ("Which was founded first, {a} or {b}?", EARLIER),
        ("Which was established first, {a} or {b}?", EARLIER),
        ("Which is older, {a} or {b}?", EARLIER),
        ("Which was started more recently, {a} or {b}?", LATER),
    ),
}
BY_PERSON = {
    "birth": (
        ("Which {kind} has the {role} who was born first, {a} or {b}?", EARLIER),
        ("Which {kind} has the {role} who was born earlier, {a} or {b}?", EARLIER),
        ("Which {kind} whose {role} is older, {a} or {b}?", EARLIER),
        ("Which {kind} has the {role} born later, {a} or {b}?", LATER),
        ("Which {kind} whose {role} is younger, {a} or {b}?", LATER),
    ),
    "death": (
        ("Which {kind} has the {role} who died first, {a} or {b}?", EARLIER),
        ("Which {kind} has the {role} who died earlier, {a} or {b}?", EARLIER),
        ("Which {kind} has the {role} who died later, {a} or {b}?", LATER),
    ),
}
SAME = {
    "nationality": (
        "Are {a} and {b} of the same nationality?",
        "Do {a} and {b} share the same nationality?",
        "Were {a} and {b} from the same country?",
        "Are both {a} and {b} from the same country?",
    ),
    "country": (
        "Are {a} and {b} from the same country?",
        "Are both movies, {a} and {b}, from the same country?",
        "Do both films, {a} and {b}, come from the same country?",
    ),
    "occupation": ("Do {a} and {b} have the same occupation?", "Did {a} and {b} have the same profession?"),
    "director": ("Do {a} and {b} have the same director?", "Were {a} and {b} directed by the same person?"),
    "year": ("Did {a} and {b} come out in the same year?", "Were {a} and {b} released in the same year?"),
}
SAME_OF_PERSONS = (
    "Are the {role} of {kind} {a} and the {role} of {kind} {b} from the same country?",
    "Do both {kind}s {a} and {b} have the {role}s from the same country?",
    "Do the {role} of {a} and the {role} of {b} share the same nationality?",
    "Are the {role}s of both {kind}s {a} and {b} of the same nationality?",
)
SHARED = {
    "nationality": ("What nationality do {a} and {b} share?", "What is the nationality of both {a} and {b}?"),
    "occupation": ("What occupation do {a} and {b} have in common?", "What profession do both {a} and {b} share?"),
}
BOTH_ARE = ("Are both {a} and {b} {value}?", "Are {a} and {b} both {value}?", "Were {a} and {b} both {value}?")
_KIND_WORDS = {"film": "film", "work": "song"}
MIN_WEIGHT_OF_DATES = 0.6


@dataclass(frozen=True)
class Side:
    """One of two things compared: what the question calls it, and the facts that decide."""

    name: str
    facts: dict[str, str]
    kind: str = ""
    role: str = ""


def compare(passages: Sequence[Passage], links: Sequence[Link], rng: Random) -> Question | None:
    """One comparison between two of the passages, or between the persons of two links; None if nothing compares."""
    if len(links) > 1 and rng.random() < 0.35:
        sides = [
            Side(link.source.name, dict(link.target.facts), _KIND_WORDS[link.source.kind], link.relation)
            for link in links
            if link.source.kind in _KIND_WORDS
        ]
        ask: Callable[..., Question | None] = _dates if rng.random() < MIN_WEIGHT_OF_DATES else _sameness
        if question := ask(sides, rng, of_persons=True):
            return question
    sides = [Side(p.name, dict(p.facts)) for p in passages if p.facts]
    ask = rng.choices((_dates, _sameness, _shared, _lifetimes), (0.62, 0.24, 0.1, 0.04))[0]
    return ask(sides, rng)


def _pair(sides: Sequence[Side], attribute: str, rng: Random, same: bool | None = None) -> tuple[Side, Side] | None:
    """Two sides that have the attribute, and (in the first word's sense) the same or different values of it."""
    having = [s for s in sides if attribute in s.facts]
    rng.shuffle(having)
    for i, a in enumerate(having):
        for b in having[i + 1 :]:
            comparable = a.name != b.name and (a.kind, a.role) == (b.kind, b.role)
            if comparable and (same is None or (a.facts[attribute] == b.facts[attribute]) is same):
                return a, b
    return None


def _dates(sides: Sequence[Side], rng: Random, of_persons: bool = False) -> Question | None:
    table = BY_PERSON if of_persons else BY_DATE
    for attribute in rng.sample(list(table), len(table)):
        if pair := _pair(sides, attribute, rng):
            a, b = pair
            days = date_key(a.facts[attribute]), date_key(b.facts[attribute])
            if not comparable_dates(*days):
                continue
            template, earlier = rng.choice(table[attribute])
            winner = a if (days[0] < days[1]) == earlier else b
            text = template.format(a=a.name, b=b.name, kind=a.kind, role=a.role)
            return Question(text, winner.name, "comparison")
    return None


def _sameness(sides: Sequence[Side], rng: Random, of_persons: bool = False) -> Question | None:
    same = rng.random() < 0.5
    for attribute in ("nationality",) if of_persons else rng.sample(list(SAME), len(SAME)):
        if pair := _pair(sides, attribute, rng, same):
            a, b = pair
            templates = SAME_OF_PERSONS if of_persons else SAME[attribute]
            value = a.facts[attribute] if rng.random() < 0.5 else b.facts[attribute]
            if attribute == "nationality" and not of_persons and rng.random() < 0.3:
                templates = BOTH_ARE
            text = rng.choice(templates).format(a=a.name, b=b.name, kind=a.kind, role=a.role, value=value)
            return Question(text, "yes" if same else "no", "sameness")
    return None


def _shared(sides: Sequence[Side], rng: Random) -> Question | None:
    for attribute in rng.sample(list(SHARED), len(SHARED)):
        if pair := _pair(sides, attribute, rng, same=True):
            a, b = pair
            text = rng.choice(SHARED[attribute]).format(a=a.name, b=b.name)
            return Question(text, a.facts[attribute], "sameness")
    return None


def _lifetimes(sides: Sequence[Side], rng: Random) -> Question | None:
    pair = _pair([s for s in sides if "birth" in s.facts], "death", rng)
    if not pair:
        return None
    a, b = pair
    spans = [date_key(s.facts["death"])[0] - date_key(s.facts["birth"])[0] for s in pair]
    if abs(spans[0] - spans[1]) < 2 or not all(0 < span < 110 for span in spans):
        return None
    return Question(f"Who lived longer, {a.name} or {b.name}?", (a if spans[0] > spans[1] else b).name, "comparison")


def date_key(date: str) -> tuple[int, int, int]:
    """(year, month, day) of a date as passages spell it; 0 for what it does not say."""
    year = re.search(r"\d{3,4}$", date)
    month = next((i for i, name in enumerate(MONTHS, 1) if name in date), 0)
    day = re.search(r"\b\d{1,2}\b", date)
    return (int(year.group(0)) if year else 0, month, int(day.group(0)) if day else 0)


def comparable_dates(a: tuple[int, int, int], b: tuple[int, int, int]) -> bool:
    """Whether it is sure which of two dates is the earlier one."""
    return a[0] > 0 and b[0] > 0 and (a[0] != b[0] or (a[1] > 0 and b[1] > 0 and a != b))
