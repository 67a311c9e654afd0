"""A tiny model on disk, documents, and the commands run as a user runs them: through `scripts.cli.main`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from scripts.cli import main

PASSAGES = [
    ("Anna Brell", "Anna Brell was a film director from the port of Kell. She was born on 3 May 1911."),
    ("The Grey Ferry", "The Grey Ferry is a 1949 film directed by Anna Brell about a ferry that never lands."),
    ("Kell", "Kell is a port on the north coast. Its harbour was dredged twice and silted up three times."),
    ("Oskar Venn", "Oskar Venn wrote songs for the radio. He was born on 9 August 1923 in the town of Lum."),
    ("Lum", "Lum is a town on the river Ost. It has a mill, a weir and a museum of clocks."),
    ("Red Weather", "Red Weather is a song by Oskar Venn. It was recorded in one night in a disused mill."),
]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, make_config, make_hf, tokenizer) -> Path:
    """A directory with a tiny random Llama and a byte tokenizer, as any user's model would lie there."""
    path = tmp_path_factory.mktemp("model")
    make_hf(make_config("llama", max_position_embeddings=4096), "eager").save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def documents(tmp_path) -> Path:
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps({"title": t, "text": x}) + "\n" for t, x in PASSAGES))
    return path


@dataclass(frozen=True)
class Shell:
    """Runs commands with the tiny model and one data directory."""

    data_dir: Path
    model: Path

    def __call__(self, command: str, *args: object) -> int:
        where = ["--data-dir", self.data_dir, "--model", self.model]
        return main([command, *map(str, [*args, *where])])


@pytest.fixture
def shell(tmp_path, tiny_model) -> Shell:
    return Shell(tmp_path / "data", tiny_model)


@pytest.fixture
def preprocessed(shell, documents) -> Callable[..., Shell]:
    """A collection `default` of six chunks with raw and fused KV."""
    assert shell("ingest", documents) == 0
    assert shell("preprocess", "--num-related", 2) == 0
    return shell
