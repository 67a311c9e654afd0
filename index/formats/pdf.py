"""PDF files: one section per page, so that a citation can name the page.

Knows nothing about other formats; runs no OCR (a scan without a text layer is refused with that remedy).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from index.errors import DocumentError
from index.formats.parsed import Parsed, one_line, sections_of
from index.types import Section

if TYPE_CHECKING:
    from pypdf import PdfReader

_HYPHENATION = re.compile(r"(?<=[a-z])-\n(?=[a-z])")
_WRAPPED_LINE = re.compile(r"(?<![.!?:;\n])[ \t]*\n(?=[a-z(])")


def read_pdf(path: Path) -> Iterator[Parsed]:
    """Text of every page in order. Encrypted, damaged or text-free files raise DocumentError."""
    try:
        reader = _open(path)
        pages = [Section("", _unwrap(page.extract_text()), number) for number, page in enumerate(reader.pages, 1)]
        title = one_line(str(reader.metadata.title or "")) if reader.metadata else ""
    except (DocumentError, OSError):
        raise
    except Exception as error:  # a damaged PDF makes the parser raise nearly anything, RecursionError included
        raise DocumentError(path, f"cannot be parsed as PDF ({error}); repair it, e.g. by printing it anew") from error
    sections = sections_of(pages)
    if not sections:
        raise DocumentError(path, f"no text on any of its {len(pages)} pages; if it is a scan, run OCR on it first")
    yield Parsed(title or None, sections)


def _open(path: Path) -> PdfReader:
    from pypdf import PasswordType, PdfReader

    reader = PdfReader(path)
    # Many files are encrypted with an empty user password: readable by anyone, printing is what they restrict.
    if reader.is_encrypted and reader.decrypt("") == PasswordType.NOT_DECRYPTED:
        raise DocumentError(path, "is encrypted with a password; remove it first, e.g. `qpdf --decrypt`")
    return reader


def _unwrap(text: str) -> str:
    """Joins lines that the layout broke inside a sentence, and words that it hyphenated."""
    return _WRAPPED_LINE.sub(" ", _HYPHENATION.sub("", text))
