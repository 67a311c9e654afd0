"""The echoing rag of `echo_rag`, the app around it, and a real server around that."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import httpx
import pytest

from server.config import ServerConfig
from tests.server.echo_rag import EchoRag, LiveServer, open_app, serving


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
