"""What the server and its ingest process say to each other: one JSON object a line, over the process's pipes.

Server → process: first a `Setup`, then an empty line whenever there may be new work. Process → server: `Report`s.
Knows nothing about who sends what when.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

from fusionrag.config import ModelConfig, PromptConfig
from index.config import ChunkingConfig, EmbeddingConfig
from index.ingest_job import JobOutcome
from index.types import IngestProgress

JobKey: TypeAlias = tuple[str, str]  # collection, file id
WAKE = b"\n"


@dataclass(frozen=True)
class GivenUp:
    """A job that the process is not to try again, but to fail with this message (the file's name goes in front)."""

    key: JobKey
    message: str


@dataclass(frozen=True)
class Setup:
    """All that the process is told. Sizes in bytes, `nice` is added to the server's own niceness."""

    data_dir: str
    model: ModelConfig
    prompt: PromptConfig
    chunking: ChunkingConfig
    embedding: EmbeddingConfig
    nice: int
    memory_bytes: int  # 0: no limit
    given_up: tuple[GivenUp, ...] = ()

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def decode(cls, line: str | bytes) -> Setup:
        d = json.loads(line)
        return cls(
            d["data_dir"],
            ModelConfig(**d["model"]),
            PromptConfig(**d["prompt"]),
            ChunkingConfig(**d["chunking"]),
            EmbeddingConfig(**d["embedding"]),
            d["nice"],
            d["memory_bytes"],
            tuple(GivenUp(_key(g["key"]), g["message"]) for g in d["given_up"]),
        )


@dataclass(frozen=True)
class Report:
    """What the process does: it has begun a job, come further with it, ended it, waits, or could not go on.

    num_wakes: of one that waits, how often it had been woken when it found nothing to do.
    """

    event: Literal["begun", "progress", "ended", "idle", "trouble"]
    key: JobKey | None = None
    progress: IngestProgress | None = None
    outcome: JobOutcome | None = None
    message: str = ""
    num_wakes: int = 0

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def decode(cls, line: str | bytes) -> Report:
        d: dict[str, Any] = json.loads(line)
        key, progress = d["key"], d["progress"]
        return cls(
            d["event"],
            None if key is None else _key(key),
            None if progress is None else IngestProgress(**progress),
            d["outcome"],
            d["message"],
            d["num_wakes"],
        )


def _key(pair: list[str]) -> JobKey:
    collection, file_id = pair
    return collection, file_id
