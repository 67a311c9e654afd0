"""The nouns of this package, and the corpus they are read from.

Knows nothing about questions' wording, tokens or models.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Kind = Literal["film", "work", "person", "organisation", "place", ""]

_PARENTHESIS = re.compile(r"\s*(?:\([^)]*\)|-)\s*$")


@dataclass(frozen=True)
class Passage:
    """A piece of an article. `facts` are what rules found in its text; every value stands verbatim in it."""

    title: str
    text: str
    kind: Kind = ""
    facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The title without what only tells articles apart: 'Camille (1921 film)' is 'Camille'."""
        return _PARENTHESIS.sub("", self.title).strip()


@dataclass(frozen=True)
class Link:
    """`source`'s fact `relation` names the person of `target`: the bridge of a two-hop question."""

    source: Passage
    relation: str
    target: Passage


@dataclass(frozen=True)
class Question:
    """What is asked, the one answer that is learned, and its kind, such as 'bridge' or 'comparison'."""

    text: str
    answer: str
    kind: str


@dataclass(frozen=True)
class HumanQuestion:
    """A question that a person wrote, all its accepted answers, and the passages that answer it."""

    text: str
    answers: tuple[str, ...]
    gold: tuple[Passage, ...]


def read_passages(path: Path) -> list[Passage]:
    """`[{title, text}]`, without exact repetitions and without passages too short to say anything."""
    found = {(item["title"], item["text"]): None for item in json.loads(path.read_text(encoding="utf-8"))}
    return [Passage(title, text) for title, text in found if title and len(text.split()) >= 8]


def read_human_questions(path: Path) -> list[HumanQuestion]:
    """`[{question, answers, gold: [{title, text}]}]`."""
    return [
        HumanQuestion(
            item["question"], tuple(item["answers"]), tuple(Passage(g["title"], g["text"]) for g in item["gold"])
        )
        for item in json.loads(path.read_text(encoding="utf-8"))
    ]


def by_name(passages: Sequence[Passage]) -> dict[str, list[int]]:
    """Lower-cased name → places in `passages`."""
    found: dict[str, list[int]] = {}
    for place, passage in enumerate(passages):
        found.setdefault(passage.name.lower(), []).append(place)
    return found
