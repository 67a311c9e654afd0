"""Which source supports which sentence of an answer. Pure text; knows nothing of models, HTTP or formats.

A sentence is supported by the fewest sources that together hold at least half of its words, where rare words count
more: a word's weight falls with the number of the sources' sentences that have it. An answer of a few words (a name, a
date) is supported by the one source that has all of them in one sentence, best the one that speaks of what was asked.
Where nothing fits, nothing is cited.

Invariants: what is cited does not depend on how the answer was cut into pieces; the pieces that come out, joined, are
the answer (with markers, where they are wanted); the work grows with the length of answer and sources, not faster.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from fusionrag.rag import Source

CitationStyle = Literal["annotations", "inline", "none"]

MIN_SUPPORT = 0.5  # share of a sentence's weight that its sources must hold
MIN_GAIN = 0.2  # share that each of them must add
FEW_WORDS = 3
_NO_EVIDENCE = ({"yes"}, {"no"})  # found in many a source, supported by none
_EAST_ASIAN = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"  # written without spaces: each character is a word
_WORD = re.compile(rf"[{_EAST_ASIAN}]|[^\W_{_EAST_ASIAN}]+")
_UNIT = re.compile(r"(?<=[.!?…])\s+|[\n。！？]+")

_WIDE_END, _WIDE_CLOSING = "。！？", "”’」』）"
_RUN = re.compile(rf"\s+|[{_WIDE_END}{_WIDE_CLOSING}]+|[^\s{_WIDE_END}{_WIDE_CLOSING}]+")
_ENDED = re.compile(r"[.!?…][\"'”’»)\]]{0,3}\Z")
_WIDE_ENDED = re.compile(rf"[{_WIDE_END}][{_WIDE_CLOSING}]{{0,3}}\Z")
_ABBREVIATED = re.compile(
    r"(?:\b[A-Z]|\b(?:Mr|Mrs|Ms|Dr|Prof|St|Mt|Jr|Sr|No|vs|cf|approx|ca|e\.g|i\.e|Inc|Ltd|Co))\.\Z"
)
_LOOK_BACK = 12  # characters that the three patterns above need to see


@dataclass(frozen=True)
class Citation:
    """The characters [begin, end) of the answer are supported by `source`. `number` counts the answer's citations."""

    number: int
    begin: int
    end: int
    source: Source


@dataclass(frozen=True)
class CitedPiece:
    """Text to send, and the citations of the sentences that ended with it or before it."""

    text: str
    citations: tuple[Citation, ...] = ()


def words_of(text: str) -> list[str]:
    """The words as they are compared: case-folded, in one Unicode form."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


class Attribution:
    """Finds the sources of sentences. The sources are read when the first sentence asks, or `read` is called."""

    def __init__(self, question: str, sources: Sequence[Source]) -> None:
        self._question, self._sources = question, sources

    def read(self) -> None:
        """Reads the sources now, about half a millisecond a thousand characters; may be called from another thread."""
        _ = self._about

    def supporters(self, sentence: str) -> tuple[Source, ...]:
        """The sources that support the sentence, in the order of the prompt."""
        words = words_of(sentence)
        distinct = set(words)
        if not distinct or not self._sources or distinct in _NO_EVIDENCE:
            return ()
        found = self._containing(distinct) if len(words) <= FEW_WORDS else self._covering(distinct)
        return tuple(self._sources[i] for i in sorted(found))

    def _containing(self, words: set[str]) -> list[int]:
        """The source with all the words in one sentence."""
        units = set.intersection(*(self._units.get(word, set()) for word in words))
        return [max({self._source_of[unit] for unit in units}, key=self._fit)] if units else []

    def _covering(self, words: set[str]) -> list[int]:
        """The fewest sources, by the greedy rule, that hold enough of the words; none if all of them do not."""
        weight = {word: self._weight(word) for word in sorted(words)}  # sorted: sums are the same everywhere
        total, left, found = sum(weight.values()), set(words), list[int]()
        holds = {i: {word for word in words if i in self._holders.get(word, ())} for i in range(len(self._sources))}
        while left and len(found) < len(holds):
            gains = {i: sum(weight[word] for word in sorted(held & left)) for i, held in holds.items()}
            best = max(gains, key=lambda i: (gains[i], self._fit(i)))
            if gains[best] < MIN_GAIN * total:
                break
            found.append(best)
            left -= holds[best]
        covered = total - sum(weight[word] for word in sorted(left))
        return found if covered >= MIN_SUPPORT * total else []

    def _fit(self, source: int) -> tuple[float, int]:
        """How much of the question the source speaks of; then the place in the prompt, for ties."""
        return self._about[source], -source

    def _weight(self, word: str) -> float:
        """Log of how rare the word is among the sources' sentences; short words are mostly grammar, digits are not."""
        rarity = math.log1p(len(self._source_of) / max(1, len(self._units.get(word, ()))))
        return rarity if len(word) > 3 or not word.isascii() or word.isdigit() else rarity / 2

    @cached_property
    def _units(self) -> dict[str, set[int]]:
        """word → the sentences of the sources (titles are some) that have it."""
        units: dict[str, set[int]] = {}
        for number, words in enumerate(words for source in self._split for words in source):
            for word in words:
                units.setdefault(word, set()).add(number)
        return units

    @cached_property
    def _source_of(self) -> list[int]:
        """sentence → source"""
        return [i for i, units in enumerate(self._split) for _ in units]

    @cached_property
    def _holders(self) -> dict[str, set[int]]:
        """word → the sources that have it"""
        return {word: {self._source_of[unit] for unit in units} for word, units in self._units.items()}

    @cached_property
    def _about(self) -> list[float]:
        """For each source, the weight of the question's words that it has."""
        asked = sorted(set(words_of(self._question)))
        return [
            sum(self._weight(word) for word in asked if i in self._holders.get(word, ()))
            for i in range(len(self._sources))
        ]

    @cached_property
    def _split(self) -> list[list[list[str]]]:
        """The words of each sentence of each source."""
        return [[words_of(unit) for unit in (s.title, *_UNIT.split(s.text))] for s in self._sources]


class Citer:
    """Takes an answer piece by piece and gives it back with its citations, each as soon as its sentence has ended.

    White space is held back until it is known whether a sentence has ended before it: a marker stands in front of it.
    """

    def __init__(self, question: str, sources: Sequence[Source], style: CitationStyle) -> None:
        self._attribution = Attribution(question, sources)
        self._passes_through = style == "none" or not sources
        self._is_inline = style == "inline"
        self._sentence: list[str] = []  # what has come of it
        self._tail = ""  # its last characters
        self._gap = ""  # white space behind it
        self._begin = self._num_sent = 0  # characters; the sentence began at `_begin`
        self._num_cited = 0

    def read_sources(self) -> None:
        """What the first citation would else wait for; may be called from another thread."""
        if not self._passes_through:
            self._attribution.read()

    def add(self, piece: str) -> CitedPiece:
        """What may be sent now; nothing of a piece of white space."""
        if self._passes_through:
            return CitedPiece(piece)
        out: list[str] = []
        citations: list[Citation] = []
        for run in _RUN.findall(piece):
            if run.isspace():
                self._gap += run
                continue
            if self._sentence and self._is_border(run[0]):
                citations += self._close(out, is_last=False)
            self._send(out, self._gap)
            if not self._sentence:
                self._begin, self._gap = self._num_sent, ""
            self._send(out, run)
            self._sentence += (self._gap, run)
            self._tail = (self._tail + self._gap + run)[-_LOOK_BACK:]
            self._gap = ""
        return CitedPiece("".join(out), tuple(citations))

    def finish(self) -> CitedPiece:
        """What was held back, and the citations of the last sentence."""
        out: list[str] = []
        citations = self._close(out, is_last=True)
        self._send(out, self._gap)
        self._gap = ""
        return CitedPiece("".join(out), tuple(citations))

    def _is_border(self, following: str) -> bool:
        """Whether the sentence so far is complete, given the character behind the gap."""
        if not self._gap:
            return following not in _WIDE_END + _WIDE_CLOSING and _WIDE_ENDED.search(self._tail) is not None
        if "\n" in self._gap or _WIDE_ENDED.search(self._tail):
            return True
        is_ended = _ENDED.search(self._tail) is not None and _ABBREVIATED.search(self._tail) is None
        return is_ended and not following.islower()

    def _close(self, out: list[str], is_last: bool) -> list[Citation]:
        """Ends the sentence: its citations, and their markers into `out`."""
        sentence, self._sentence, self._tail = "".join(self._sentence), [], ""
        end = self._begin + len(sentence)
        if not is_last and not any(c.isalpha() for c in sentence):  # the number of a list's item
            return []
        supporters = self._attribution.supporters(sentence)
        if self._is_inline and supporters:
            self._send(out, " " + "".join(f"[{source.index}]" for source in supporters))
        self._num_cited += len(supporters)
        first = self._num_cited - len(supporters)
        return [Citation(first + i, self._begin, end, source) for i, source in enumerate(supporters)]

    def _send(self, out: list[str], text: str) -> None:
        out.append(text)
        self._num_sent += len(text)
