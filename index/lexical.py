"""Words → chunks that have them, by BM25: one SQLite FTS5 table for each collection.

Knows nothing about vectors, fusion, or who asks. Works on the connection that it is given: the caller's transaction
changes chunks and words together.

Invariants: a collection's table holds exactly the words of its chunks, so that no score depends on another collection's
text; nothing in a question is ever read as FTS5 syntax.
"""

from __future__ import annotations

import json
import re
import sqlite3
import unicodedata
from collections.abc import Iterable

MAX_TERMS = 128  # different words of a question that are looked for: the longest ones of a longer question
_TOKENIZER = "porter unicode61 remove_diacritics 2"
_SATURATION = 10.0  # the BM25 value whose `saturated` score is 1/2
_TITLE_WEIGHT = 5.0  # of a word in the title; one in the text has 1
# Scripts written without spaces, which the tokenizer would take for one word a sentence: each character is a word.
_UNSPACED = re.compile(r"([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff])")
_TERM = re.compile(r"[^\W_]+")


def add_words(connection: sqlite3.Connection, collection_id: int, document_row: int) -> None:
    """Enters the chunks of a document (its row id), which must be in `chunks` already."""
    table = _table(collection_id)
    # Contentless: the words only. The text stays in `chunks`, from where it is read again to remove it.
    connection.execute(
        f"CREATE VIRTUAL TABLE IF NOT EXISTS {table} USING fts5(title, text, content='', tokenize='{_TOKENIZER}')"
    )
    connection.executemany(
        f"INSERT INTO {table} (rowid, title, text) VALUES (?, ?, ?)", _words(connection, document_row)
    )


def remove_words(connection: sqlite3.Connection, collection_id: int, document_row: int) -> None:
    """Takes the chunks of a document out again; to be called before they leave `chunks`."""
    table = _table(collection_id)
    if _exists(connection, table):
        connection.executemany(
            f"INSERT INTO {table} ({table}, rowid, title, text) VALUES ('delete', ?, ?, ?)",
            _words(connection, document_row),
        )


def drop_words(connection: sqlite3.Connection, collection_id: int) -> None:
    """Removes all that is kept of a collection."""
    connection.execute(f"DROP TABLE IF EXISTS {_table(collection_id)}")


def search_words(
    connection: sqlite3.Connection,
    collection_id: int,
    question: str,
    limit: int,
    row_ids: Iterable[int] | None = None,
) -> list[tuple[int, float]]:
    """(row id, BM25 value) of the `limit` best chunks that have a word of the question, of `row_ids` if given.

    The value is above 0 and grows with the number and the rarity of the words.
    """
    table, expression = _table(collection_id), match_expression(question)
    if not expression:
        return []
    # The plus keeps SQLite from looking the words up once for every row id.
    only, values = ("", ()) if row_ids is None else (" AND +rowid IN (SELECT value FROM json_each(?))", (row_ids,))
    try:
        rows = connection.execute(
            f"SELECT rowid, rank FROM {table} WHERE {table} MATCH ? AND rank MATCH 'bm25({_TITLE_WEIGHT}, 1.0)'{only} "
            "ORDER BY rank, rowid LIMIT ?",
            (expression, *(json.dumps([int(i) for i in v]) for v in values), limit),
        ).fetchall()
    except sqlite3.OperationalError as error:
        if "no such table" in str(error):  # it never held a document, or was deleted a moment ago
            return []
        raise
    return [(row_id, -rank) for row_id, rank in rows]  # FTS5 has the best first


def saturated(value: float) -> float:
    """A BM25 value b as the score b / (b + 10), in (0, 1)."""
    return value / (value + _SATURATION)


def match_expression(question: str) -> str:
    """The question as an FTS5 expression: any of its words, each quoted; '' where it has none."""
    found = _TERM.findall(_spaced(unicodedata.normalize("NFC", question)))
    terms = list({term.casefold(): term for term in found}.values())  # as they were: FTS5 folds ß otherwise
    if len(terms) > MAX_TERMS:
        terms = sorted(terms, key=len, reverse=True)[:MAX_TERMS]
    return " OR ".join(f'"{term}"' for term in terms)


def _words(connection: sqlite3.Connection, document_row: int) -> list[tuple[int, str, str]]:
    rows = connection.execute("SELECT id, title, text FROM chunks WHERE document = ? ORDER BY id", (document_row,))
    return [(row_id, _spaced(title), _spaced(text)) for row_id, title, text in rows]


def _spaced(text: str) -> str:
    return _UNSPACED.sub(r" \1 ", text)


def _exists(connection: sqlite3.Connection, table: str) -> bool:
    return connection.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (table,)).fetchone() is not None


def _table(collection_id: int) -> str:
    return f"fts_{collection_id:d}"
