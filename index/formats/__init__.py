"""Readers, one module per file format: path → `Parsed`. `READERS` is the table of file extensions.

Knows nothing about ids, collections or chunks. Parsing libraries are imported when a file of their format is read, so
that `import index` needs none of them.

Invariant: what a reader yields is clean text (see `clean`) in reading order; what it cannot read raises DocumentError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from index.formats.docx import read_docx
from index.formats.html import read_html
from index.formats.parsed import Parsed
from index.formats.pdf import read_pdf
from index.formats.records import read_json, read_jsonl
from index.formats.text import read_markdown, read_plain

Reader = Callable[[Path], Iterator[Parsed]]

READERS: Mapping[str, Reader] = {
    ".txt": read_plain,
    ".md": read_markdown,
    ".markdown": read_markdown,
    ".html": read_html,
    ".htm": read_html,
    ".pdf": read_pdf,
    ".docx": read_docx,
    ".json": read_json,
    ".jsonl": read_jsonl,
}

__all__ = ["READERS", "Parsed", "Reader"]
