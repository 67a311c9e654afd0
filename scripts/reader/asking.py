"""Questions about facts: one passage, two passages joined by a link, and which of many to ask in a context.

Knows nothing about tokens. Invariant: an answer stands verbatim in the passage that the question leads to; of a two-hop
question it does not stand in the first passage as well.
"""

from __future__ import annotations

import re
from random import Random

from scripts.reader.facts import gender
from scripts.reader.passages import Link, Passage, Question
from scripts.reader.patterns import YEAR

SINGLE = {
    "director": ("Who directed the film {x}?", "Who is the director of {x}?", "Who was {x} directed by?"),
    "year": ("When was the film {x} released?", "In what year did the film {x} come out?", "What year was {x} made?"),
    "country": ("Which country is the film {x} from?", "What nationality is the film {x}?"),
    "star": ("Who starred in the film {x}?", "Which actor stars in {x}?", "Who plays the lead in {x}?"),
    "producer": ("Who produced the film {x}?", "Who is the producer of {x}?"),
    "composer": ("Who composed the music of {x}?", "Who is the composer of {x}?"),
    "author": ("Who wrote the work that {x} is based on?", "Who is the author behind {x}?"),
    "performer": ("Who is the performer of {x}?", "Which artist performed {x}?", "Who sings {x}?"),
    "released": ("When was {x} released?", "When did {x} come out?", "What is the release date of {x}?"),
    "birth": ("When was {x} born?", "What is {x}'s date of birth?", "On what date was {x} born?"),
    "death": ("When did {x} die?", "What is the date of death of {x}?", "On what date did {x} die?"),
    "birthplace": ("Where was {x} born?", "What is the place of birth of {x}?", "In which place was {x} born?"),
    "deathplace": ("Where did {x} die?", "What is the place of death of {x}?", "In which place did {x} die?"),
    "nationality": ("What nationality is {x}?", "What is the nationality of {x}?", "Which country is {x} from?"),
    "occupation": ("What is the occupation of {x}?", "What did {x} do for a living?", "What is {x}'s profession?"),
    "parent": ("Who was {x}'s parent?", "{x} was a child of whom?", "Who is a parent of {x}?"),
    "spouse": ("Who is {x}'s spouse?", "Who did {x} marry?", "Who was {x} married to?"),
    "education": ("Where did {x} study?", "Which school did {x} attend?", "Where did {x} graduate from?"),
    "sibling": ("Who is {x}'s sibling?", "Who is the sibling of {x}?"),
    "where": ("Where is {x} located?", "Where is {x}?", "In which place is {x}?"),
    "founded": ("When was {x} founded?", "In what year was {x} established?", "When did {x} open?"),
}
OF_A_PERSON = {  # the second hop; {x} is a description such as 'the director of film Camille'
    "birth": (
        "When was {x} born?",
        "What is the date of birth of {x}?",
        "When is {x}'s birthday?",
        "On what date was {x} born?",
    ),
    "death": ("When did {x} die?", "What is the date of death of {x}?", "On what date did {x} die?"),
    "birthplace": ("Where was {x} born?", "What is the place of birth of {x}?", "In which place was {x} born?"),
    "deathplace": (
        "Where did {x} die?",
        "What is the place of death of {x}?",
        "Where was the place of death of {x}?",
    ),
    "nationality": ("What nationality is {x}?", "What is the nationality of {x}?", "Which country {x} is from?"),
    "occupation": ("What is the occupation of {x}?", "What does {x} do for a living?"),
    "parent": ("Who is a parent of {x}?", "{x} is a child of whom?"),
    "spouse": ("Who is the spouse of {x}?", "Who did {x} marry?", "Who is {x} married to?"),
    "education": ("Where did {x} study?", "Where did {x} graduate from?"),
    "sibling": ("Who is the sibling of {x}?", "Who is {x}'s sibling?"),
}
IN_YEAR = {
    "birth": ("In what year was {x} born?", "{x} was born in what year?", "What year was {x} born in?"),
    "death": ("In what year did {x} die?", "{x} died in what year?"),
}
DESCRIPTIONS = {
    "director": ("the director of film {x}", "the director of {x}", "the person who directed {x}"),
    "star": ("the star of the film {x}", "the actor who starred in {x}"),
    "producer": ("the producer of film {x}", "the producer of {x}"),
    "composer": ("the composer of film {x}", "the composer of the music of {x}"),
    "author": ("the author of the work that {x} is based on", "the author behind {x}"),
    "performer": ("the performer of song {x}", "the performer of {x}", "the artist behind {x}"),
    "parent": ("the parent of {x}", "{x}'s parent"),
    "spouse": ("{x}'s spouse", "the spouse of {x}"),
    "sibling": ("{x}'s sibling", "the sibling of {x}"),
}
_GENDERED = {
    "parent": {"male": "father", "female": "mother"},
    "spouse": {"male": "husband", "female": "wife"},
    "sibling": {"male": "brother", "female": "sister"},
}
_MAY_STAND_IN_BOTH = ("nationality", "occupation")


def ask_fact(passage: Passage, rng: Random) -> Question | None:
    """A question that one fact of one passage answers."""
    attributes = [a for a in passage.facts if a in SINGLE]
    if not attributes:
        return None
    attribute = rng.choice(attributes)
    return _ask(passage.name, attribute, passage.facts[attribute], SINGLE[attribute], "single", rng)


def describe(link: Link, rng: Random) -> str:
    """The linked person in words that do not name them: 'the father of X' where their passage says 'he'."""
    name, gendered = link.source.name, _GENDERED.get(link.relation, {}).get(gender(link.target))
    if gendered and rng.random() < 0.8:
        return rng.choice((f"the {gendered} of {name}", f"{name}'s {gendered}"))
    return rng.choice(DESCRIPTIONS[link.relation]).format(x=name)


def ask_bridge(link: Link, rng: Random) -> Question | None:
    """A two-hop question: a fact of the person whom the link leads to."""
    source, facts = link.source, link.target.facts
    attributes = [a for a in OF_A_PERSON if a in facts and (a in _MAY_STAND_IN_BOTH or facts[a] not in source.text)]
    attributes = [a for a in attributes if facts[a] not in (source.name, link.target.name)]
    if not attributes:
        return None
    weights = [0.4 if a in _MAY_STAND_IN_BOTH else 1.0 for a in attributes]  # most people have them, and they are short
    attribute = rng.choices(attributes, weights)[0]
    return _ask(describe(link, rng), attribute, facts[attribute], OF_A_PERSON[attribute], "bridge", rng)


def _ask(who: str, attribute: str, value: str, templates: tuple[str, ...], kind: str, rng: Random) -> Question:
    year = re.search(YEAR, value)
    if attribute in IN_YEAR and year and rng.random() < 0.2:
        text, value = rng.choice(IN_YEAR[attribute]), year.group(0)
    else:
        text = rng.choice(templates)
    text = text.format(x=who)
    return Question(text[0].upper() + text[1:], value, kind)
