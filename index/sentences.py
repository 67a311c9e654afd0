"""Cuts text into pieces at ever weaker borders: section, paragraph, sentence, word, inside a word.

Knows nothing about tokens; who asks says which pieces are still too long (`split_piece`).

Invariant: no character but white space at a border is lost; `separator + text` of all pieces, joined, is the document.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

from index.types import Section

_PARAGRAPH = re.compile(r"[ \t]*\n\s*\n\s*")
_CLOSING = "\"'\u201d\u2019\u00bb)\\]"  # quotes and brackets that may follow a full stop
_WIDE_END, _WIDE_CLOSING = "\u3002\uff01\uff1f", "\u201d\u2019\u300d\u300f\uff09"  # East Asian: no space follows
_SENTENCE = re.compile(rf"(?:[.!?\u2026]+[{_CLOSING}]*\s+|[{_WIDE_END}][{_WIDE_CLOSING}]*\s*)(?=\S)")
_NOT_AN_END = re.compile(
    r"(?:\b[A-Z]|\b(?:Mr|Mrs|Ms|Dr|Prof|St|Mt|Jr|Sr|No|vs|cf|approx|ca|e\.g|i\.e|Inc|Ltd|Co))\.\s+\Z"
)
_LINE, _SPACE = re.compile(r"\s*\n\s*"), re.compile(r"\s+")
_LOOK_BACK = 12  # characters that _NOT_AN_END needs to see
_NEAR = 256  # characters around the middle of a piece where white space is looked for first


SENTENCE_ENDS = f".!?:\u2026{_WIDE_END}"


class Border(IntEnum):
    """What lies in front of a piece; the greater, the better a place to cut."""

    INSIDE_WORD = 0
    WORD = 1
    SENTENCE = 2
    PARAGRAPH = 3
    SECTION = 4


@dataclass(frozen=True)
class Piece:
    """Text that is kept whole. `separator` is the white space between it and the piece before it."""

    text: str
    border: Border
    separator: str
    section: int  # place of its section in the document
    heading: str = ""  # of its section
    page: int | None = None


def pieces_of(sections: Sequence[Section]) -> list[Piece]:
    """The sentences of all sections, in order. A section without text gives its heading as a piece."""
    pieces: list[Piece] = []
    for number, section in enumerate(sections):
        text = section.text.strip()
        heading = section.heading if text else ""
        whole = Piece(text or section.heading, Border.SECTION, "\n\n", number, heading, section.page)
        for paragraph in _split(whole, _PARAGRAPH, Border.PARAGRAPH) if whole.text else ():
            pieces.extend(_split(paragraph, _SENTENCE, Border.SENTENCE))
    return pieces


def split_piece(piece: Piece) -> tuple[Piece, Piece]:
    """Two halves of a piece of at least two characters: cut at a line, else at white space, else inside a word."""
    text, middle = piece.text, len(piece.text) // 2
    gap = (
        _nearest_gap(_LINE, text, reach=len(text) // 4)
        or _nearest_gap(_SPACE, text, reach=_NEAR)
        or _nearest_gap(_SPACE, text, reach=len(text))
    )
    start, stop = gap or (middle, middle)
    border = Border.WORD if gap else Border.INSIDE_WORD
    tail = replace(piece, text=text[stop:], border=border, separator=text[start:stop])
    return replace(piece, text=text[:start]), tail


def _nearest_gap(pattern: re.Pattern[str], text: str, reach: int) -> tuple[int, int] | None:
    """The run `[start, stop)` of white space nearest to the middle of `text`, found by `pattern` within `reach`."""
    middle = len(text) // 2
    spans = (match.span() for match in pattern.finditer(text, max(0, middle - reach), middle + reach))
    start, stop = min(spans, key=lambda span: abs(span[0] - middle), default=(0, 0))
    start, stop = len(text[:start].rstrip()), len(text) - len(text[stop:].lstrip())
    return (start, stop) if 0 < start < stop < len(text) else None


def _split(piece: Piece, pattern: re.Pattern[str], border: Border) -> Iterator[Piece]:
    """The parts of a piece between the matches of `pattern`; a sentence keeps its full stop."""
    text, start, separator, front = piece.text, 0, piece.separator, piece.border
    for match in pattern.finditer(text):
        if border is Border.SENTENCE and not _ends_sentence(text, match.end()):
            continue
        end = start + len(text[start : match.end()].rstrip())
        yield replace(piece, text=text[start:end], separator=separator, border=front)
        start, separator, front = match.end(), text[end : match.end()], border
    yield replace(piece, text=text[start:], separator=separator, border=front)


def _ends_sentence(text: str, end: int) -> bool:
    """Whether a sentence may end right before `end`, where the next one would start."""
    before = text[max(0, end - _LOOK_BACK) : end]
    return not text[end].islower() and _NOT_AN_END.search(before) is None
