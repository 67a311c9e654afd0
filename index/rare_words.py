"""Which chunks share rare words: those that name the same person, place or work, whatever else they are about.

Embeddings put texts of one kind side by side, two films or two biographies; a question in two steps needs the film and
its director. That link is a name, and a name is a word that few chunks have. Knows nothing of KV, models or the
catalogue. Invariant: what is found depends only on the texts and the order in which they were added.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator

MAX_SHARE = 0.02  # a word that more of the chunks have than this is not rare …
ALWAYS_RARE = 10  # … unless it is in this few
_POWER = 4  # of a word's inverse document frequency: one shared name outweighs many shared common words
_WORD = re.compile(r"[^\W_]+")


class RareWords:
    """Texts by name. `add` them all, then ask for the `nearest` of each."""

    def __init__(self) -> None:
        self._words_of: dict[str, frozenset[str]] = {}
        self._place_of: dict[str, int] = {}
        self._names_with: dict[str, list[str]] = defaultdict(list)

    def add(self, name: str, text: str) -> None:
        """A name that is known already is left as it is."""
        if name in self._words_of:
            return
        words = frozenset(_WORD.findall(text.casefold()))
        self._place_of[name] = len(self._words_of)
        self._words_of[name] = words
        for word in words:
            self._names_with[word].append(name)

    def nearest(self, name: str, top_k: int, near_duplicate: float = 1.0) -> tuple[str, ...]:
        """The others that share the most, and the rarest, words with `name`, best first; ties in the order of `add`.

        Left out are texts that share at least `near_duplicate` of all that is rare in either. An unknown name has none.
        """
        scores: dict[str, float] = defaultdict(float)
        for word, weight in self._rare(name):
            for other in self._names_with[word]:
                scores[other] += weight
        own = scores.pop(name, 0.0)
        found = []
        for other in sorted(scores, key=lambda other: (-scores[other], self._place_of[other])):
            score = scores[other]
            is_copy = score >= near_duplicate * own and score >= near_duplicate * self._total(other)
            found += [] if is_copy else [other]
            if len(found) == top_k:
                break
        return tuple(found)

    def _rare(self, name: str) -> Iterator[tuple[str, float]]:
        """The rare words of a text with their weights; sorted, since a set's order changes with the process."""
        num_texts = len(self._words_of)
        for word in sorted(self._words_of.get(name, ())):
            having = len(self._names_with[word])
            if having <= max(ALWAYS_RARE, MAX_SHARE * num_texts):
                yield word, math.log((num_texts + 1) / (having + 0.5)) ** _POWER

    def _total(self, name: str) -> float:
        return sum(weight for _, weight in self._rare(name))
