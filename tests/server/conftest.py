"""The echoing rag of `echo_rag`, the app around it, and a real server around that."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import openai
import pytest

from server.config import ServerConfig
from tests.server.echo_rag import EchoRag, LiveServer, open_app, serving
from tests.server.live_collections import Opened, open_live


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def rag() -> EchoRag:
    return EchoRag()


@pytest.fixture
async def client(rag: EchoRag) -> AsyncIterator[httpx.AsyncClient]:
    async with open_app(rag) as client:
        yield client


@pytest.fixture
def live(rag: EchoRag) -> Iterator[LiveServer]:
    with serving(rag, ServerConfig(drain_timeout_s=0)) as server:
        yield server


# real collections, and a server over them


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opened]:
    with open_live(tmp_path) as opened:
        yield opened


@pytest.fixture
def config() -> ServerConfig:
    """Of `server`. A module may have its own."""
    return ServerConfig(drain_timeout_s=0)


@pytest.fixture
def server(opened: Opened, config: ServerConfig) -> Iterator[LiveServer]:
    with serving(EchoRag(), config, live=opened.live) as server:
        yield server


@pytest.fixture
def sdk(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client
