"""The sample corpus: invented people, places and works (so no model knows the answers), and questions about them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
CORPUS = FOLDER / "corpus"


def passages() -> list[tuple[str, str]]:
    """(title, text) of the encyclopedia's records."""
    return [(record["title"], record["text"]) for record in _read_jsonl(CORPUS / "encyclopedia.jsonl")]


def questions() -> list[dict[str, Any]]:
    """`{question, answers, type, gold}` of each sample question; `gold` are titles."""
    return _read_jsonl(FOLDER / "questions.jsonl")


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
