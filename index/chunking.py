"""Documents → Chunks: packs sentences into passages that fit the language model's token budget.

Knows nothing about language models but the `ChunkEncoder` it is given, whose count of the *rendered* passage is the
truth: the costs of single sentences only guide the packing, every chunk is then encoded as a whole and checked.

Invariants: no chunk is longer than `chunk_tokens`; no word of the document is lost or put out of order; without overlap
no word is repeated but section headings, which go in front of every chunk that starts in their section.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import replace

from index.config import ChunkingConfig
from index.errors import InvalidValue
from index.sentences import SENTENCE_ENDS, Border, Piece, pieces_of, split_piece
from index.types import Chunk, ChunkEncoder, Document, Section

_CHARS_PER_TOKEN = 8  # a text with more characters than this per token of the budget is not tried as one chunk
_PARTS = 4  # a sentence longer than a chunk is split into parts of at most this share of one
_MIN_FILL = 0.5  # a chunk may end early, at a stronger border, once it is this full


def chunk_document(document: Document, encoder: ChunkEncoder, config: ChunkingConfig) -> list[Chunk]:
    """The document's text as chunks of at most `config.chunk_tokens` tokens each, in reading order.

    Cuts at the strongest border in the second half of the budget: section, paragraph, sentence, word, and inside a word
    only where one word exceeds the budget. Raises InvalidValue where `chunk_tokens` leaves no room for any text beside
    the passage template.
    """
    pieces = pieces_of([_without_title(s, document.title) for s in document.sections])
    whole = _render(pieces)
    if len(whole) <= config.chunk_tokens * _CHARS_PER_TOKEN:
        token_ids = encoder.encode(document.title, whole)
        if len(token_ids) <= config.chunk_tokens:
            page = pieces[0].page if pieces else None
            one = Chunk(document.title, whole, tuple(token_ids), document.document_id, ordinal=0, page=page)
            return [one] if pieces else []
    return list(_Packer(document, encoder, config).chunks())


class _Packer:
    """Packs the pieces of one document; `costs[i]` estimates the tokens of `pieces[i]`."""

    def __init__(self, document: Document, encoder: ChunkEncoder, config: ChunkingConfig) -> None:
        self.encoder, self.limit, self.overlap = encoder, config.chunk_tokens, config.chunk_overlap_tokens
        self.document_id = document.document_id
        self.title = self._fitting_title(document.title)
        self.title_cost = self._count(self.title, "")
        self.empty_cost = self._count("", "")
        self.heading_costs = {s.heading: self._cost(s.heading) + 1 for s in document.sections if s.heading}
        self.pieces: list[Piece] = []
        self.costs: list[int] = []
        self._measure(pieces_of([self._fitting_heading(_without_title(s, document.title)) for s in document.sections]))

    def chunks(self) -> Iterator[Chunk]:
        start = ordinal = 0
        while start < len(self.pieces):
            text, token_ids, end = self._passage(start)
            yield Chunk(self.title, text, tuple(token_ids), self.document_id, ordinal, self.pieces[start].page)
            start, ordinal = end, ordinal + 1

    def _passage(self, start: int) -> tuple[str, list[int], int]:
        """Text and token ids of the chunk whose first new piece is `start`, and the first new piece of the next."""
        begin = self._overlap_begin(start)
        end = self._fill(begin)
        while True:
            if end <= start:  # no room for anything new: without the repeated sentences, one piece at least
                begin, end = start, max(self._fill(start), start + 1)
            end = self._best_cut(begin, start, end)
            text = _render(self.pieces[begin:end])
            ids = self.encoder.encode(self.title, text)
            excess = len(ids) - self.limit
            if excess <= 0:
                return text, ids, end
            if end - start == 1 and begin == start:
                self._split_in_place(start)
            else:
                end = max(self._drop(end, excess), start + (begin == start))

    def _fill(self, begin: int) -> int:
        """The end of the longest run of pieces from `begin` that should fit, by their costs."""
        total, section = self.title_cost, -1
        for i in range(begin, len(self.pieces)):
            piece = self.pieces[i]
            total += self.costs[i] + (self.heading_costs.get(piece.heading, 0) if piece.section != section else 0)
            if total > self.limit:
                return i
            section = piece.section
        return len(self.pieces)

    def _best_cut(self, begin: int, start: int, end: int) -> int:
        """The best place to cut in `(start, end]`: the strongest border that leaves the chunk full enough."""
        if end == len(self.pieces):
            return end
        best, filled = end, sum(self.costs[begin:end])
        least = filled * _MIN_FILL
        for cut in range(end - 1, start, -1):
            filled -= self.costs[cut]
            if filled < least:
                break
            if self.pieces[cut].border > self.pieces[best].border:
                best = cut
        return best

    def _overlap_begin(self, start: int) -> int:
        """Where the chunk of new piece `start` begins: whole sentences of the same section up to the overlap."""
        begin, room = start, self.overlap
        for i in range(start - 1, -1, -1):
            room -= self.costs[i]
            if room < 0 or self.pieces[i].section != self.pieces[start].section:
                break
            if self.pieces[i].border >= Border.SENTENCE:
                begin = i
        return begin

    def _drop(self, end: int, excess: int) -> int:
        """`end` moved back by pieces worth about `excess` tokens, one at least."""
        while excess > 0:
            end -= 1
            excess -= max(1, self.costs[end])
        return end

    def _measure(self, pieces: list[Piece]) -> None:
        """Fills `pieces` and `costs`; a piece that no chunk can hold is split until several parts fit into one."""
        for piece in pieces:
            room = max(1, self.limit - self.title_cost - self.heading_costs.get(piece.heading, 0))
            todo = [piece]
            while todo:
                part = todo.pop()
                is_long = len(part.text) > room * _CHARS_PER_TOKEN  # then not even worth counting
                cost = room + 1 if is_long else self._cost(part.text)
                if cost <= room or len(part.text) == 1:
                    self._append(part, cost)
                else:
                    if part is piece:
                        room = max(1, room // _PARTS)
                    todo.extend(reversed(split_piece(part)))

    def _append(self, piece: Piece, cost: int) -> None:
        self.pieces.append(piece)
        self.costs.append(cost + (piece.separator != " "))

    def _split_in_place(self, i: int) -> None:
        if len(self.pieces[i].text) == 1:
            raise InvalidValue("chunk_tokens", f"{self.limit} leaves no room for text beside the passage template")
        halves = split_piece(self.pieces[i])
        self.pieces[i : i + 1] = halves
        self.costs[i : i + 1] = [self._cost(half.text) + (half.separator != " ") for half in halves]

    def _fitting_title(self, title: str) -> str:
        """The title, shortened at a word border where it takes more than half of the budget."""
        most = self.limit // 2
        if self._count(title, "") <= most:
            return title
        length = bisect.bisect_right(range(len(title)), most, key=lambda n: self._count(title[:n].rstrip(), "")) - 1
        if length < 0:
            raise InvalidValue("chunk_tokens", f"{self.limit} leaves no room for text beside the passage template")
        at_word = title[: length + 1].rpartition(" ")[0]
        return (at_word or title[:length]).rstrip()

    def _fitting_heading(self, section: Section) -> Section:
        """A heading that takes more than a quarter of the budget becomes a paragraph."""
        if section.heading and self.heading_costs[section.heading] > self.limit // 4:
            return replace(section, heading="", text=f"{section.heading}\n\n{section.text}")
        return section

    def _count(self, title: str, text: str) -> int:
        return len(self.encoder.encode(title, text))

    def _cost(self, text: str) -> int:
        return max(1, self._count("", text) - self.empty_cost)


def _without_title(section: Section, title: str) -> Section:
    """The section without its heading where that only says what the title says."""
    return replace(section, heading="") if section.heading.casefold() == title.casefold() else section


def _render(pieces: Sequence[Piece]) -> str:
    """The pieces as one text, each section's heading in front of its first piece."""
    parts: list[str] = []
    section = -1
    for piece in pieces:
        if parts:
            parts.append(piece.separator)
        if piece.heading and piece.section != section:
            parts.append(piece.heading if piece.heading[-1] in SENTENCE_ENDS else f"{piece.heading}.")
            parts.append(" ")
        parts.append(piece.text)
        section = piece.section
    return "".join(parts)
