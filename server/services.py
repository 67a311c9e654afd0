"""What the routes are given: the parts of one running server."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from fastapi import Request

from fusionrag.rag import Rag
from server.access_log import RequestRecord
from server.answer import Preparation
from server.config import ServerConfig
from server.errors import ModelUnknown
from server.live import LiveCollections
from server.metrics import Metrics
from server.worker import Worker


@dataclass(frozen=True)
class Services:
    """The parts of one server. `created` is the Unix time of its start."""

    rag: Rag
    worker: Worker
    preparation: Preparation
    metrics: Metrics
    config: ServerConfig
    created: int = field(default_factory=lambda: int(time.time()))
    live: LiveCollections | None = None  # None: collections change by the command line only

    def check_model(self, name: str) -> None:
        """Raises ModelUnknown."""
        if name != self.rag.model_name:
            raise ModelUnknown(f"no model {name!r} here; this server has {self.rag.model_name!r}")


def owner_of(request: Request) -> str:
    """Whose request it is: the name of its API key; '' for the operator, and for everybody where keys are not used."""
    return str(request.state.owner)


def timeout_of(request: Request) -> float:
    """Seconds that the request has for its answer: the server's limit, or less where the client asked for less."""
    return float(request.state.timeout_s)


def record_of(request: Request) -> RequestRecord:
    record: RequestRecord = request.state.record
    return record
