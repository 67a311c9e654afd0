"""The embeddings route: its wire, its limits, and the official client as the judge."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import struct
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import httpx
import numpy as np
import openai
import pytest
from openai.types.embedding_create_params import EmbeddingCreateParams

from index import Embedder
from index.config import EmbeddingConfig
from server.api import embeddings
from server.config import ServerConfig
from server.protocol.embeddings import EmbeddingRequest
from tests.server.echo_rag import EchoEmbedder, EchoRag, eventually, open_app, serving

pytestmark = pytest.mark.anyio

PATH = "/v1/embeddings"
MODEL = EchoEmbedder.name
TEXTS = ["ab", "a b", "abc de"]  # (words, letters): (1, 2), (2, 2), (2, 5)
VECTORS = [[1 / 5**0.5, 2 / 5**0.5], [0.5**0.5, 0.5**0.5], [2 / 29**0.5, 5 / 29**0.5]]


@pytest.fixture
def rag() -> EchoRag:
    return EchoRag(embedder=EchoEmbedder())


@pytest.fixture
async def client(rag: EchoRag) -> AsyncIterator[httpx.AsyncClient]:
    async with open_app(rag) as client:
        yield client


async def refused(client: httpx.AsyncClient, status: int = 400, **body: object) -> dict:
    reply = await client.post(PATH, json={"model": MODEL, "input": "a"} | body)
    assert reply.status_code == status, reply.text
    return reply.json()["error"]


async def test_an_answer_has_exactly_these_fields(client) -> None:
    reply = (await client.post(PATH, json={"model": MODEL, "input": TEXTS})).json()
    vectors = [item.pop("embedding") for item in reply["data"]]
    assert np.allclose(vectors, VECTORS)
    assert reply == {
        "object": "list",
        "data": [{"object": "embedding", "index": i} for i in range(3)],
        "model": MODEL,
        "usage": {"prompt_tokens": 5, "total_tokens": 5},
    }


async def test_one_text_is_a_list_of_one(client) -> None:
    one = (await client.post(PATH, json={"model": MODEL, "input": "ab"})).json()
    assert one == (await client.post(PATH, json={"model": MODEL, "input": ["ab"]})).json()


async def test_base64_is_little_endian_floats(client) -> None:
    reply = (await client.post(PATH, json={"model": MODEL, "input": "ab", "encoding_format": "base64"})).json()
    (item,) = reply["data"]
    assert np.allclose(struct.unpack("<2f", base64.b64decode(item["embedding"])), VECTORS[0])


async def test_many_texts_keep_their_order(client) -> None:
    texts = ["a" * (i + 1) for i in range(embeddings.TEXTS_AT_A_TIME * 2 + 5)]
    reply = (await client.post(PATH, json={"model": MODEL, "input": texts})).json()
    expected = EchoEmbedder().embed(texts)
    assert np.array_equal(np.array([item["embedding"] for item in reply["data"]], np.float32), expected)


def test_every_parameter_of_the_official_client_is_known() -> None:
    assert set(EmbeddingCreateParams.__annotations__) == set(EmbeddingRequest.model_fields)


@pytest.mark.parametrize(
    "body, param, says",
    [
        ({"input": [1, 2]}, "input", "tokens"),
        ({"input": [[1, 2]]}, "input", "tokens"),
        ({"input": []}, "input", "at least 1"),
        ({"input": ""}, "input.0", "at least 1"),
        ({"input": ["a", ""]}, "input.1", "at least 1"),
        ({"input": None}, "input", "list"),
        ({"input": ["a"] * 2049}, "input", "at most 2048"),
        ({"encoding_format": "hex"}, "encoding_format", "base64"),
        ({"dimensions": 3}, "dimensions", "has 2 dimensions"),
        ({"dimensions": 0}, "dimensions", "greater"),
        ({"truncate": True}, "truncate", "unknown"),
    ],
)
async def test_what_cannot_be_embedded_is_refused_by_name(client, body: dict, param: str, says: str) -> None:
    error = await refused(client, **body)
    assert error["param"] == param
    assert says in error["message"]


async def test_the_models_own_dimensions_may_be_named(client) -> None:
    assert (await client.post(PATH, json={"model": MODEL, "input": "a", "dimensions": 2})).status_code == 200


async def test_tokens_are_limited_together(client) -> None:
    half = "a " * (embeddings.MAX_TOKENS // 2)
    assert (await client.post(PATH, json={"model": MODEL, "input": [half, half]})).status_code == 200
    error = await refused(client, input=[half, half, "a"])
    assert (error["param"], str(embeddings.MAX_TOKENS + 1) in error["message"]) == ("input", True)


async def test_another_model_is_unknown_the_language_model_too(client, rag: EchoRag) -> None:
    for name in ("text-embedding-3-small", rag.model_name):
        error = await refused(client, 404, model=name)
        assert (error["param"], error["code"]) == ("model", "model_not_found")
        assert MODEL in error["message"]


async def test_a_server_without_collections_embeds_nothing() -> None:
    async with open_app(EchoRag()) as client:
        assert (await refused(client, 404))["code"] == "model_not_found"


@dataclass
class HeldEmbedder(EchoEmbedder):
    """Waits to be let go."""

    num_calls: int = 0
    let_go: threading.Event = field(default_factory=threading.Event)

    def embed(self, texts):
        self.num_calls += 1
        assert self.let_go.wait(5)
        return super().embed(texts)


async def test_texts_for_a_client_that_has_gone_are_not_embedded() -> None:
    embedder = HeldEmbedder()
    body = json.dumps({"model": MODEL, "input": ["a"] * embeddings.TEXTS_AT_A_TIME * 5}).encode()
    head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    with serving(EchoRag(embedder=embedder), ServerConfig(drain_timeout_s=0)) as live:
        connection = socket.create_connection(("127.0.0.1", int(live.url.rpartition(":")[2])))
        connection.sendall(head.encode() + body)
        eventually(lambda: embedder.num_calls == 1)
        connection.close()
        await asyncio.sleep(0.2)
        embedder.let_go.set()
        await asyncio.sleep(0.2)
    assert embedder.num_calls == 1


def test_the_official_client_reads_floats_and_base64() -> None:
    with (
        serving(EchoRag(embedder=EchoEmbedder()), ServerConfig(drain_timeout_s=0)) as live,
        openai.OpenAI(base_url=live.url + "/v1", api_key="none", max_retries=0) as client,
    ):
        decoded = client.embeddings.create(model=MODEL, input=TEXTS)  # asks for base64 by itself
        floats = client.embeddings.create(model=MODEL, input=TEXTS, encoding_format="float")
    assert np.allclose([item.embedding for item in decoded.data], VECTORS)
    assert np.allclose([item.embedding for item in floats.data], VECTORS)
    assert decoded.usage.prompt_tokens == 5


async def test_the_async_client_gets_the_vectors_of_the_packaged_model() -> None:
    embedder = Embedder(EmbeddingConfig())
    texts = ["Mars is red.", "Venus is hot. " * 400]
    with serving(EchoRag(embedder=embedder), ServerConfig(drain_timeout_s=0)) as live:
        async with openai.AsyncOpenAI(base_url=live.url + "/v1", api_key="none", max_retries=0) as client:
            reply = await client.embeddings.create(model="all-MiniLM-L6-v2", input=texts)
    vectors = np.array([item.embedding for item in reply.data], np.float32)
    assert np.allclose(vectors, embedder.embed(texts), atol=1e-6)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1)
    assert reply.usage.prompt_tokens == sum(embedder.num_tokens(texts)) > 1600
