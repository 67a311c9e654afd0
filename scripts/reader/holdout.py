"""What evaluation files ask about, taken out of the training data and counted.

Knows nothing about how training questions are made. Invariant: after `exclude`, no passage and no human question shares
`SHARED_WORDS` running words with a passage that answers an evaluation question, and no question is one of theirs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from zlib import crc32

from scripts.evaluation.datasets import Example
from scripts.reader.passages import HumanQuestion, Passage

SHARED_WORDS = 13


@dataclass(frozen=True)
class Excluded:
    """How many of each were dropped."""

    passages: int
    human_questions: int


class Holdout:
    """The gold passages (all passages, where a file marks none) and the questions of evaluation examples."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._questions = {_words(example.question) for example in examples}
        self._titles: set[str] = set()
        self._runs: set[tuple[str, ...]] = set()
        for example in examples:
            for passage in [example.passages[i] for i in example.gold] or example.passages:
                self._runs |= _runs(passage.text)
                if example.gold and passage.title:
                    self._titles.add(Passage(passage.title, "").name.lower())

    def holds_text(self, text: str) -> bool:
        return not self._runs.isdisjoint(_runs(text))

    def holds_passage(self, passage: Passage) -> bool:
        return passage.name.lower() in self._titles or self.holds_text(passage.text)

    def holds_question(self, question: HumanQuestion) -> bool:
        """By its words, or by the text of its passages; another paragraph of the same article is no overlap."""
        return _words(question.text) in self._questions or any(self.holds_text(p.text) for p in question.gold)


def exclude(
    passages: Sequence[Passage], human: Sequence[HumanQuestion], holdout: Holdout
) -> tuple[list[Passage], list[HumanQuestion], Excluded]:
    """What may be trained on, and how much was dropped."""
    kept = [p for p in passages if not holdout.holds_passage(p)]
    asked = [q for q in human if not holdout.holds_question(q)]
    return kept, asked, Excluded(len(passages) - len(kept), len(human) - len(asked))


def set_aside(
    passages: Sequence[Passage], human: Sequence[HumanQuestion], share: float
) -> tuple[tuple[list[Passage], list[HumanQuestion]], tuple[list[Passage], list[HumanQuestion]]]:
    """(for training, for validation), decided by a hash of a passage's name and of a question's first gold name."""

    def aside(name: str) -> bool:
        return crc32(name.lower().encode()) < share * 2**32

    parts = []
    for wanted in (False, True):
        questions = [q for q in human if aside(q.gold[0].name) is wanted]
        parts.append(([p for p in passages if aside(p.name) is wanted], questions))
    return parts[0], parts[1]


def _words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+", text.lower()))


def _runs(text: str) -> set[tuple[str, ...]]:
    words = _words(text)
    return {words[i : i + SHARED_WORDS] for i in range(len(words) - SHARED_WORDS + 1)}
