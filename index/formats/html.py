"""HTML files: the visible text of the page, one section per heading.

Knows nothing about other formats; fetches nothing.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from index.formats.parsed import Parsed, clean, one_line, read_text_bytes, sections_of
from index.types import Section

if TYPE_CHECKING:
    from bs4 import BeautifulSoup

_INVISIBLE = ["script", "style", "noscript", "template", "nav", "svg", "iframe", "head"]
_HEADINGS = ["h1", "h2", "h3", "h4", "h5", "h6"]
_PARAGRAPHS = ["p", "div", "section", "article", "header", "footer", "main", "aside", "blockquote", "pre", "figure"]
_PARAGRAPHS += ["ul", "ol", "dl", "table", "hr", "body", "details"]
_LINES = ["br", "li", "tr", "dt", "dd", "caption", "figcaption", "summary"]
_HEADING_START, _HEADING_END = "\x02", "\x03"  # control characters cannot occur in cleaned text


def read_html(path: Path) -> Iterator[Parsed]:
    """One section per h1…h6. The encoding is the one the page declares, else detected."""
    from bs4 import BeautifulSoup, MarkupResemblesLocatorWarning, XMLParsedAsHTMLWarning

    with warnings.catch_warnings():  # XHTML read as HTML gives the right text
        warnings.simplefilter("ignore", XMLParsedAsHTMLWarning)
        warnings.simplefilter("ignore", MarkupResemblesLocatorWarning)
        soup = BeautifulSoup(read_text_bytes(path), "lxml")
    title = one_line(soup.title.get_text()) if soup.title else ""
    text = _visible_text(soup)
    before, *parts = text.split(_HEADING_START)
    sections = [Section("", _tidy(before))]
    for part in parts:
        heading, _, body = part.partition(_HEADING_END)
        sections.append(Section(heading, _tidy(body)))
    yield Parsed(title or None, sections_of(sections))


def _visible_text(soup: BeautifulSoup) -> str:
    """Text with white space as a browser shows it; headings stand between the two marks."""
    from bs4.element import NavigableString

    for tag in soup.find_all(_INVISIBLE):
        tag.decompose()
    for string in soup.find_all(string=True):
        is_text = type(string) is NavigableString  # its subclasses are comments and the like, which stay unseen
        if is_text and string.find_parent("pre") is None:  # outside pre, white space means one space
            string.replace_with(re.sub(r"\s+", " ", clean(string)))
    for tag in soup.find_all(_PARAGRAPHS):
        tag.insert(0, "\n\n")
        tag.append("\n\n")
    for tag in soup.find_all(_LINES):
        tag.insert_before("\n")
    for tag in soup.find_all(["td", "th"]):
        tag.append("\t")
    for tag in soup.find_all(_HEADINGS):
        tag.replace_with(f"{_HEADING_START}{one_line(tag.get_text())}{_HEADING_END}")
    return soup.get_text()


def _tidy(text: str) -> str:
    text = re.sub(r"[ \t]+\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"\n (?=\S)", "\n", text))
