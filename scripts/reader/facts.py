"""Facts of a passage, found by rules: what it is about, and attributes such as `director` or `birth`.

Knows nothing about questions. Invariant: every value is a substring of the passage's text and not its title.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from scripts.reader.passages import Kind, Link, Passage, by_name
from scripts.reader.patterns import DATE, FULL_NAME, MONTH, NAME, NATIONALITY, OCCUPATION, PLACE, RULER, YEAR, tidy

PEOPLE = ("director", "star", "producer", "composer", "author", "performer", "parent", "spouse", "sibling")
MAX_VALUE_WORDS, MAX_VALUE_LETTERS = 9, 70

_LOWER = r"(?:[a-z\-/]+ )"
_IN = r"(?: (?:on|in))?[^.\d]{0,25}?"
_THE_NATION = rf"(?:the )?(?:(?:{NATIONALITY}) )?"
_NATIONS = rf"(?:(?:{NATIONALITY})(?:[ -]born)?[ -]?){{1,2}}"
_LIVED = rf"^[^(]{{0,60}}\([^)]{{0,80}}?(?:\bborn\b[^)]{{0,40}}?\d{{4}}|{DATE}[^)]{{0,60}}? ?[–-] ?[^)]*\d{{3,4}})"
_KINDS: tuple[tuple[Kind, str], ...] = (
    ("person", _LIVED),
    ("film", rf"\bis an? [^.]{{0,120}}?\b(?:film|movie)\b(?! (?:{OCCUPATION}|and (?:television|stage|theat)))"),
    ("work", r"\bis (?:an?|the) [^.]{0,80}?\b(?:song|single|album|EP|novel|book|opera|video game)\b"),
    ("person", rf"\b(?:was|is) (?:an?|the) [^.]{{0,100}}?\b(?:{OCCUPATION}|{RULER})\b"),
    (
        "organisation",
        r"\b(?:is|was) an? [^.]{0,80}?\b(?:company|band|university|school|college|magazine|newspaper|club|team"
        r"|organization|organisation|airline|museum|bank|label|publisher|institute|station|festival|party)\b",
    ),
    ("place", r"\b(?:is|was) an? [^.]{0,60}?\b(?:located |situated |based )?in (?:the )?[A-Z]"),
)
_HEAD_LETTERS = 300


@dataclass(frozen=True)
class Rule:
    """Group 1 of the first match is the value of `attribute` for passages of this kind; `head`: only at their start."""

    kind: Kind
    attribute: str
    pattern: re.Pattern[str]
    head: bool = False


def _rules(kind: Kind, table: Iterable[tuple[str, str, bool]]) -> list[Rule]:
    return [Rule(kind, attribute, re.compile(pattern), head) for attribute, pattern, head in table]


_MADE_BY = r"(?:the )?(?:\w+ (?:film ?maker|director) )?"
RULES: tuple[Rule, ...] = (
    *_rules(
        "film",
        (
            ("year", rf"\bis an? (?:upcoming )?({YEAR})", True),
            ("director", rf"directed (?:and \w+ )?by {_MADE_BY}({FULL_NAME})(?! ?(?:,|and|&) [A-Z])", False),
            ("country", rf"\bis an? (?:\d{{4}} )?(?:[a-z-]+ )?({NATIONALITY})\b", True),
            ("star", rf"(?:starring|stars|starred) ({FULL_NAME})", False),
            ("producer", rf"produced by (?:the )?({FULL_NAME})", False),
            ("composer", rf"(?:music|score|soundtrack)(?: \w+){{0,4}}? by ({FULL_NAME})", False),
            (
                "author",
                rf"(?:based on|adapted from|adaptation of)[^.]{{0,60}}? by (?:\w+ ){{0,2}}?({FULL_NAME})",
                False,
            ),
        ),
    ),
    *_rules(
        "work",
        (
            (
                "performer",
                rf"\b(?:song|single|album|EP)\b[^.]{{0,60}}? by {_THE_NATION}{_LOWER}{{0,5}}({NAME})",
                False,
            ),
            (
                "author",
                rf"\b(?:novel|book|opera)\b[^.]{{0,40}}? by {_THE_NATION}{_LOWER}{{0,4}}({FULL_NAME})",
                False,
            ),
            ("released", rf"(?:released|published) (?:on|in)[^.]{{0,20}}?({DATE}|{YEAR})", False),
        ),
    ),
    *_rules(
        "person",
        (
            ("birth", rf"(?:born|b\.)[^.);]{{0,40}}?({DATE})", True),
            ("birth", rf"\(({DATE})(?:, [^()]{{0,60}}?)? ?[–-]", True),
            ("death", rf"[–-] ?({DATE})\)?", True),
            ("death", rf"died[^.;]{{0,40}}?({DATE})", False),
            ("birthplace", rf"\bborn[^.;]{{0,60}}? (?:in|at|near) (?:the )?(?!(?:{MONTH})\b)({PLACE})", False),
            ("deathplace", rf"\bdied[^.;]{{0,60}}? (?:in|at|near) (?:the )?(?!(?:{MONTH})\b)({PLACE})", False),
            ("nationality", rf"\b(?:was|is) (?:an?|the) {_LOWER}{{0,3}}({NATIONALITY})\b", False),
            (
                "occupation",
                rf"\b(?:was|is) an? {_LOWER}{{0,2}}{_NATIONS}{_LOWER}{{0,2}}?({OCCUPATION})\b",
                False,
            ),
            ("parent", rf"\b(?:son|daughter|child) of (?:the )?{_LOWER}{{0,4}}({FULL_NAME})", False),
            ("spouse", rf"\bmarried (?:to )?(?:the )?{_LOWER}{{0,4}}(?!(?:{MONTH})\b)({FULL_NAME})", False),
            ("spouse", rf"\b(?:wife|husband|widow) of (?:the )?{_LOWER}{{0,4}}({FULL_NAME})", False),
            ("spouse", rf"\b(?:his|her) {_LOWER}?(?:wife|husband),? ({FULL_NAME})", False),
            ("sibling", rf"\b(?:brother|sister|sibling) of (?:the )?{_LOWER}{{0,4}}({FULL_NAME})", False),
            (
                "education",
                rf"(?:educated at|graduated from|studied at|degree from|graduate of|attended) (?:the )?({PLACE})",
                False,
            ),
        ),
    ),
    *_rules(
        "organisation",
        (
            (
                "founded",
                rf"(?:founded|established|formed|opened|launched|created|incorporated){_IN}({DATE}|{YEAR})",
                False,
            ),
            ("where", rf"\b(?:located|based|headquartered|situated) (?:in|at) (?:the )?({PLACE})", False),
        ),
    ),
    *_rules(
        "place",
        (
            (
                "where",
                rf"\b(?:is|was) an? (?:[\w-]+ ){{1,5}}?(?:located |situated |based )?in (?:the )?({PLACE})",
                True,
            ),
            (
                "founded",
                rf"(?:founded|established|opened|built|completed){_IN}({DATE}|{YEAR})",
                False,
            ),
        ),
    ),
)


def with_facts(passage: Passage) -> Passage:
    """The passage with kind and facts; unchanged if no rule finds any."""
    head = passage.text[:_HEAD_LETTERS]
    kind: Kind = next((kind for kind, pattern in _KINDS if re.search(pattern, head)), "")
    facts: dict[str, str] = {}
    for rule in RULES:
        if rule.kind == kind and rule.attribute not in facts:
            match = rule.pattern.search(head if rule.head else passage.text)
            if match and _is_value(rule.attribute, value := tidy(match.group(1)), passage):
                facts[rule.attribute] = value
    if facts.get("death") == facts.get("birth"):
        facts.pop("death", None)
    return replace(passage, kind=kind, facts=facts) if facts else passage


def _is_value(attribute: str, value: str, passage: Passage) -> bool:
    fits = 0 < len(value.split()) <= MAX_VALUE_WORDS and 2 < len(value) < MAX_VALUE_LETTERS
    if re.fullmatch(NATIONALITY, value) and attribute not in ("nationality", "country"):
        return False
    return fits and value in passage.text and value.lower() != passage.name.lower()


def find_links(passages: Sequence[Passage]) -> list[Link]:
    """Every fact that names a person whose passage, exactly one, is among these."""
    names, links = by_name(passages), []
    for place, passage in enumerate(passages):
        for relation in PEOPLE:
            found = [
                passages[i]
                for i in names.get(passage.facts.get(relation, "").lower(), ())
                if i != place and passages[i].kind == "person"
            ]
            if len(found) == 1:
                links.append(Link(passage, relation, found[0]))
    return links


def gender(passage: Passage) -> str:
    """'male', 'female' or '' by the pronouns of a person's passage."""
    words = re.findall(r"\b(?:he|his|him|she|her)\b", passage.text.lower())
    balance = sum(1 if word[0] == "h" and word != "her" else -1 for word in words)
    return "male" if balance > 0 else "female" if balance < 0 else ""
