"""Which chunks name the same person, place or work, whatever else they are about.

Embeddings put texts of one kind side by side, two films or two biographies; a question in two steps needs the film and
its director. That link is a name: a word, or two adjacent words, that few passages have. It is strongest where one
passage opens with the name, being about it, and the other only mentions it. A chunk may hold several passages that have
nothing to do with each other, so passages (paragraphs) are compared, and the best pair speaks for two chunks.

Knows nothing of KV, models or the catalogue. Invariant: what is found depends only on the texts and the order in which
they were added.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

MAX_SHARE = 0.03  # a word that more of the passages have than this is not rare …
ALWAYS_RARE = 10  # … unless it is in this few
_POWER = 4  # of a term's inverse document frequency: one shared name outweighs many shared common words
_OPENING_WORDS = 6  # of a passage: they say what it is about
_OPENING_WEIGHT = 4  # of a term that opens one of two passages and not the other
_WORD = re.compile(r"[^\W_]+")
_PARAGRAPH = re.compile(r"\n\s*\n")


class RareWords:
    """Texts by name. `add` them all, then ask for the `nearest` of each."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._place_of: dict[str, int] = {}
        self._id_of: dict[str, int] = {}  # words in order of their first appearance
        self._passage_of: dict[bytes, int] = {}  # by its words: one that stands in several texts is one passage
        self._words: list[np.ndarray] = []  # ids of each passage's words, int32, in reading order
        self._passages: list[int] = []  # of all texts
        self._first = [0]  # of each text in these, and one past the last
        self._table: _Table | None = None  # of what has been added so far

    def add(self, name: str, text: str) -> None:
        """A name that is known already is left as it is."""
        if name in self._place_of:
            return
        self._place_of[name] = len(self._names)
        self._names.append(name)
        self._table = None
        for passage in _PARAGRAPH.split(text):
            ids = [self._id_of.setdefault(w, len(self._id_of)) for w in _WORD.findall(passage.casefold())]
            words = np.array(ids, dtype=np.int32)
            known = self._passage_of.setdefault(blake2b(words.tobytes(), digest_size=16).digest(), len(self._words))
            self._passages.append(known)
            if known == len(self._words):
                self._words.append(words)
        self._first.append(len(self._passages))

    def nearest(self, name: str, top_k: int, near_duplicate: float = 1.0) -> tuple[str, ...]:
        """The others that share the rarest names with `name`, best first; ties in the order of `add`.

        Passages that share at least `near_duplicate` of all that is rare in either are copies, which link nothing. An
        unknown name has none.
        """
        if name not in self._place_of:
            return ()
        self._table = self._table or _Table.of(self._words)
        first, place, passages = self._first, self._place_of[name], np.array(self._passages)
        own = passages[first[place] : first[place + 1]]
        best = np.maximum.reduce([self._table.scores(passage, near_duplicate) for passage in own.tolist()])
        best[own] = 0
        scores = np.maximum.reduceat(best[passages], first[:-1])
        found = np.argsort(-scores, kind="stable")[:top_k]
        return tuple(self._names[i] for i in found.tolist() if scores[i] > 0)


@dataclass(frozen=True)
class _Table:
    """Which of P passages has which term: each rare word, and each two adjacent ones, once per passage.

    Twice the same rows: term by term, and (`term`, `opens`) passage by passage.
    """

    weight: np.ndarray  # (terms,) fp64
    first_holder: np.ndarray  # (terms + 1,) of each term in the next two
    holder: np.ndarray  # (rows,) int64: the passage that has the term
    holder_opens: np.ndarray  # (rows,) bool: and opens with it
    first_term: np.ndarray  # (P + 1,) of each passage in the next two
    term: np.ndarray  # (rows,) int64
    opens: np.ndarray  # (rows,) bool
    total: np.ndarray  # (P,) fp64: weight of all that is rare in a passage

    @staticmethod
    def of(passages: Sequence[np.ndarray]) -> _Table:
        num_passages = len(passages)
        term, holder, opens = _rows(passages)
        having = np.bincount(term)
        weight = np.log((num_passages + 1) / (having + 0.5)) ** _POWER
        by_passage = np.argsort(holder, kind="stable")
        return _Table(
            weight=weight,
            first_holder=_starts(having),
            holder=holder,
            holder_opens=opens,
            first_term=_starts(np.bincount(holder, minlength=num_passages)),
            term=term[by_passage],
            opens=opens[by_passage],
            total=np.bincount(holder, weight[term], num_passages),
        )

    def scores(self, passage: int, near_duplicate: float) -> np.ndarray:
        """(P,): what each passage shares with this one; 0 for copies."""
        rows = slice(*self.first_term[passage : passage + 2].tolist())
        term = self.term[rows]
        num_holders = np.diff(self.first_holder)[term]
        skipped = self.first_holder[term] - (np.cumsum(num_holders) - num_holders)
        at = np.repeat(skipped, num_holders) + np.arange(num_holders.sum())
        weight, holder = np.repeat(self.weight[term], num_holders), self.holder[at]
        is_about = np.repeat(self.opens[rows], num_holders) != self.holder_opens[at]
        num_passages = len(self.total)
        shared = np.bincount(holder, weight, num_passages)
        named = np.bincount(holder, weight * is_about, num_passages)
        is_copy = (shared >= near_duplicate * self.total) & (shared >= near_duplicate * self.total[passage])
        return np.where(is_copy, 0.0, shared + (_OPENING_WEIGHT - 1) * named)


def _rows(passages: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(term, passage, whether it opens with it) of all passages, sorted by these; terms are numbered from 0."""
    num_passages, lengths = len(passages), np.array([len(words) for words in passages])
    word, passage = np.concatenate(passages).astype(np.int64), np.repeat(np.arange(num_passages), lengths)
    opens = np.arange(len(word)) - np.repeat(np.cumsum(lengths) - lengths, lengths) < _OPENING_WORDS
    is_rare = np.bincount(word)[word] <= max(ALWAYS_RARE, MAX_SHARE * num_passages)
    ones = np.flatnonzero(is_rare)
    pairs = np.flatnonzero(is_rare[:-1] & is_rare[1:] & (passage[:-1] == passage[1:]))
    key = np.concatenate([word[ones], (word[pairs] + 1 << 32) + word[pairs + 1]])
    at, opens = np.concatenate([ones, pairs]), np.concatenate([opens[ones], opens[pairs + 1]])
    _, term = np.unique(key, return_inverse=True)
    row, first = np.unique(term * num_passages + passage[at], return_index=True)
    return row // num_passages, row % num_passages, opens[first]  # the first time that the passage has it


def _starts(counts: np.ndarray) -> np.ndarray:
    """Where each of consecutive runs begins, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(counts)])
