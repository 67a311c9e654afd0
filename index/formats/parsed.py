"""What every reader yields, and the text clean-up that all of them share.

Knows nothing about any one format.

Invariant: text that has passed `clean` encodes to UTF-8 and holds no control characters but tab and newline.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from index.errors import DocumentError
from index.types import Section

_NEWLINES = re.compile(r"\r\n?|[\u0085\u2028]")
_BREAKS = re.compile(r"[\f\v\u2029]")  # page and paragraph separators
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")


@dataclass(frozen=True)
class Parsed:
    """One document's worth of a file.

    `title` is None where the format states none (the first heading or the file name then serves). `record` tells the
    records of one file apart; it is '' where the file is one document.
    """

    title: str | None
    sections: tuple[Section, ...]
    metadata: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    record: str = ""


def clean(text: str) -> str:
    """`text` with newlines as '\\n', page breaks as paragraph breaks, and without control characters or surrogates."""
    text = _BREAKS.sub("\n\n", _NEWLINES.sub("\n", text))
    return _CONTROL.sub("", text).encode("utf-8", "replace").decode("utf-8")


def one_line(text: str) -> str:
    """Clean text with every run of white space turned into one space: for titles and headings."""
    return " ".join(clean(text).split())


def sections_of(sections: Iterable[Section]) -> tuple[Section, ...]:
    """The sections cleaned and stripped, without those that hold neither heading nor text."""
    cleaned = (Section(one_line(s.heading), clean(s.text).strip(), s.page) for s in sections)
    return tuple(s for s in cleaned if s.heading or s.text)


def read_text_bytes(path: Path) -> bytes:
    """The file's bytes; DocumentError if they cannot be text in any encoding with a byte order mark or of ASCII kin."""
    raw = path.read_bytes()
    if b"\x00" in raw and not raw.startswith(_UTF16):
        raise DocumentError(path, "holds NUL bytes, so it is binary data and not text; convert it to a text format")
    return raw


def decode_text(path: Path) -> str:
    """The file's text: UTF-8 (with or without byte order mark) or UTF-16 with one. Anything else: DocumentError."""
    raw = read_text_bytes(path)
    encoding = "utf-16" if raw.startswith(_UTF16) else "utf-8-sig"
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        raise DocumentError(
            path,
            f"is not valid {encoding.removesuffix('-sig').upper()} (byte {error.start}); "
            "convert it first, e.g. `iconv -f latin1 -t utf-8`",
        ) from error
