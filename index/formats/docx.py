"""DOCX files: paragraphs and tables in reading order, one section per heading.

Knows nothing about other formats; ignores headers, footers, comments and pictures.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from index.errors import DocumentError
from index.formats.parsed import Parsed, one_line, sections_of
from index.types import Section

if TYPE_CHECKING:
    from docx.document import Document as DocxDocument
    from docx.table import Table


def read_docx(path: Path) -> Iterator[Parsed]:
    """One section per paragraph in a heading or title style. Damaged files raise DocumentError."""
    import docx

    try:
        document = docx.Document(str(path))
        title = one_line(document.core_properties.title)
        sections = sections_of(_sections(document))
    except OSError:
        raise
    except Exception as error:  # a damaged archive or part makes the parser raise nearly anything
        raise DocumentError(path, f"cannot be parsed as DOCX ({error}); open it and save it anew") from error
    yield Parsed(title or None, sections)


def _sections(document: DocxDocument) -> Iterator[Section]:
    from docx.table import Table

    heading, blocks = "", list[str]()
    for block in document.iter_inner_content():
        if isinstance(block, Table):
            blocks.append(_table_text(block))
        elif block.style is not None and str(block.style.name).startswith(("Heading", "Title")) and block.text.strip():
            yield Section(heading, "\n\n".join(blocks))
            heading, blocks = block.text, []
        elif block.text.strip():
            blocks.append(block.text)
    yield Section(heading, "\n\n".join(blocks))


def _table_text(table: Table) -> str:
    rows = []
    for row in table.rows:
        cells = {cell._tc: cell.text for cell in row.cells}  # a merged cell is listed once for each column it spans
        rows.append(" | ".join(one_line(text) for text in cells.values()))
    return "\n".join(rows)
