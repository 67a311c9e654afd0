"""Plain text and Markdown files.

Knows nothing about other formats. Markdown is kept as written (a language model reads it well); only its headings are
lifted out, by a CommonMark parser, so that a '#' in a code block is not one.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

from index.formats.parsed import Parsed, clean, decode_text, sections_of
from index.types import Section

_FRONT_MATTER = re.compile(r"\A---[ \t]*\n(.*?\n)?---[ \t]*(\n|\Z)", re.DOTALL)
_TITLE_LINE = re.compile(r"^title:[ \t]*(.+?)[ \t]*$", re.MULTILINE)


def read_plain(path: Path) -> Iterator[Parsed]:
    """The whole file as one section without heading."""
    yield Parsed(None, sections_of([Section("", decode_text(path))]))


def read_markdown(path: Path) -> Iterator[Parsed]:
    """One section per heading of any level. The title is the front matter's, if there is one."""
    text = clean(decode_text(path))
    title = None
    if front := _FRONT_MATTER.match(text):
        text = text[front.end() :]
        if line := _TITLE_LINE.search(front.group(1) or ""):
            title = line.group(1).strip("'\"") or None
    yield Parsed(title, sections_of(_split_at_headings(text)))


def _split_at_headings(text: str) -> Iterator[Section]:
    from markdown_it import MarkdownIt

    lines = text.split("\n")  # not splitlines: the parser counts '\n' only
    tokens = MarkdownIt("commonmark").parse(text)
    heading, start = "", 0
    for token, inline in itertools.pairwise(tokens):
        if token.type == "heading_open" and token.level == 0 and token.map is not None:
            yield Section(heading, "\n".join(lines[start : token.map[0]]))
            heading, start = inline.content, token.map[1]
    yield Section(heading, "\n".join(lines[start:]))
