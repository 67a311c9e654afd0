"""/v1/vector_stores over the wire: OpenAI's shapes, files on their way in and out, searching, nothing for strangers."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
from openai.types import VectorStore
from openai.types.vector_stores import VectorStoreFile, VectorStoreFileBatch

from index import Document, Section
from index.api_keys import ApiKeys
from index.types import IngestProgress, KVObject
from server.config import ServerConfig
from tests.server.echo_rag import EchoRag, LiveServer, open_app, until
from tests.server.live_collections import Opened

pytestmark = pytest.mark.anyio

CONFIG = ServerConfig(drain_timeout_s=0)
STORES = "/v1/vector_stores"
PLANETS = {
    "mars.md": "# Mars\n\nMars is the red planet. It has two moons, Phobos and Deimos.",
    "venus.txt": "Venus is hot and hidden by clouds of acid.",
    "gas.jsonl": '{"id": "j", "title": "Jupiter", "text": "Jupiter is a giant of gas."}\n'
    '{"id": "s", "title": "Saturn", "text": "Saturn has rings of ice."}\n',
    "moon.html": "<html><head><title>Moon</title></head><body><p>The Moon circles the Earth.</p></body></html>",
}


@pytest.fixture
async def client(opened: Opened) -> AsyncIterator[httpx.AsyncClient]:
    async with open_app(EchoRag(), CONFIG, live=opened.live) as client:
        yield client


def upload(sdk: openai.OpenAI, name: str, text: str = "Some text.") -> str:
    return sdk.files.create(file=(name, text.encode()), purpose="assistants").id


async def uploaded(client: httpx.AsyncClient, name: str = "a.txt", text: str = "Some text.", **headers: str) -> str:
    form = {"purpose": (None, "assistants"), "file": (name, text.encode())}
    return (await client.post("/v1/files", files=form, headers=headers)).json()["id"]


async def made(client: httpx.AsyncClient, headers: dict[str, str] | None = None, **body: object) -> str:
    return (await client.post(STORES, json=body, headers=headers)).json()["id"]


# the whole way, by the official client


def test_files_of_several_formats_become_searchable_and_are_found_by_name(sdk: openai.OpenAI) -> None:
    store = sdk.vector_stores.create(name="Planets", metadata={"team": "sky"}, description="what goes around")
    assert (store.name, store.status, store.metadata, store.usage_bytes) == ("Planets", "completed", {"team": "sky"}, 0)
    files = [(name, text.encode()) for name, text in PLANETS.items()]
    batch = sdk.vector_stores.file_batches.upload_and_poll(store.id, files=files)
    assert (batch.status, batch.file_counts.completed, batch.file_counts.total) == ("completed", 4, 4)
    for question, name in [("two moons of the red planet", "mars.md"), ("rings of ice", "gas.jsonl")]:
        best, *_ = sdk.vector_stores.search(store.id, query=question)
        assert best.filename == name == sdk.files.retrieve(best.file_id).filename
        assert 0 < best.score <= 1 and best.content[0].type == "text"
    store = sdk.vector_stores.retrieve(store.id)
    assert store.file_counts.completed == 4 and store.usage_bytes > 0
    assert store.fusionrag["num_documents"] == 5
    assert store.fusionrag["kv"] == {"raw": 0, "fused": 0, "stale": 0, "bytes": 0}


def test_a_deleted_file_is_not_found_any_more(sdk: openai.OpenAI) -> None:
    mars, venus = (upload(sdk, name, PLANETS[name]) for name in ("mars.md", "venus.txt"))
    store = sdk.vector_stores.create(file_ids=[mars, venus])
    for file_id in (mars, venus):
        assert sdk.vector_stores.files.poll(file_id, vector_store_id=store.id).status == "completed"
    sdk.files.delete(mars)
    assert [hit.file_id for hit in sdk.vector_stores.search(store.id, query="red planet with clouds")] == [venus]
    assert [f.id for f in sdk.vector_stores.files.list(store.id)] == [venus]
    assert sdk.vector_stores.files.delete(venus, vector_store_id=store.id).object == "vector_store.file.deleted"
    assert sdk.vector_stores.search(store.id, query="clouds").data == []
    assert sdk.files.retrieve(venus).id == venus
    assert sdk.vector_stores.retrieve(store.id).usage_bytes == 0


async def test_the_async_client_does_the_same(server: LiveServer) -> None:
    async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as sdk:
        store = await sdk.vector_stores.create(name="Planets")
        files = [(name, text.encode()) for name, text in PLANETS.items()]
        batch = await sdk.vector_stores.file_batches.upload_and_poll(store.id, files=files)
        assert batch.file_counts.completed == 4
        names = {f.id: f.filename async for f in sdk.files.list()}
        best = (await sdk.vector_stores.search(store.id, query="hidden by clouds")).data[0]
        assert names[best.file_id] == best.filename == "venus.txt"
        read = await sdk.vector_stores.files.content(best.file_id, vector_store_id=store.id)
        assert [part.text for part in read.data] == [PLANETS["venus.txt"]]
        assert (await sdk.vector_stores.delete(store.id)).deleted
        assert [s.id async for s in sdk.vector_stores.list()] == []


def test_an_unreadable_file_fails_with_a_reason_and_the_others_go_on(sdk: openai.OpenAI) -> None:
    store = sdk.vector_stores.create()
    files = [("good.txt", b"fine"), ("bad.pdf", b"%PDF-1.4 not really"), ("tool.exe", b"MZ")]
    batch = sdk.vector_stores.file_batches.upload_and_poll(store.id, files=files)
    assert (batch.file_counts.completed, batch.file_counts.failed) == (1, 2)
    failed = {sdk.files.retrieve(f.id).filename: f for f in sdk.vector_stores.files.list(store.id, filter="failed")}
    assert failed["bad.pdf"].last_error.code == "invalid_file"
    assert failed["tool.exe"].last_error.code == "unsupported_file"
    for name, file in failed.items():
        assert file.last_error.message.startswith(f"{name}: ")
    one = sdk.vector_stores.files.create_and_poll(failed["tool.exe"].id, vector_store_id=store.id)
    assert one.status == "failed"


def test_searches_are_filtered_by_attributes_which_can_change(sdk: openai.OpenAI) -> None:
    store = sdk.vector_stores.create()
    old, new = upload(sdk, "old.txt", "The red report."), upload(sdk, "new.txt", "The red story.")
    for file_id, year in ((old, 1999), (new, 2024)):
        attributes = {"year": year, "draft": False, "kind": "text"}
        file = sdk.vector_stores.files.create_and_poll(file_id, vector_store_id=store.id, attributes=attributes)
        assert file.attributes == attributes

    def found(filters: dict[str, Any]) -> set[str]:
        return {hit.file_id for hit in sdk.vector_stores.search(store.id, query="red", filters=filters)}

    recent: dict[str, Any] = {"type": "gte", "key": "year", "value": 2000}
    assert found(recent) == {new}
    assert found({"type": "or", "filters": [recent, {"type": "eq", "key": "kind", "value": "text"}]}) == {old, new}
    changed = sdk.vector_stores.files.update(old, vector_store_id=store.id, attributes={"year": 2030})
    assert changed.attributes == {"year": 2030}
    assert found(recent) == {old, new} and found({"type": "eq", "key": "draft", "value": False}) == {new}


def test_several_queries_find_what_each_finds_once_best_first_and_no_more_than_asked_for(sdk: openai.OpenAI) -> None:
    store = sdk.vector_stores.create()
    sdk.vector_stores.file_batches.upload_and_poll(store.id, files=[(n, t.encode()) for n, t in PLANETS.items()])
    page = sdk.vector_stores.search(store.id, query=["red planet", "rings of ice"], max_num_results=50)
    texts = [hit.content[0].text for hit in page]
    assert len(texts) == len(set(texts)) and {h.filename for h in page} >= {"mars.md", "gas.jsonl"}
    scores = [hit.score for hit in page]
    assert scores == sorted(scores, reverse=True)
    assert page.search_query == ["red planet", "rings of ice"]
    assert len(sdk.vector_stores.search(store.id, query="planet moon", max_num_results=1).data) == 1
    high = sdk.vector_stores.search(store.id, query="red planet", ranking_options={"score_threshold": 0.95}).data
    assert all(hit.score >= 0.95 for hit in high) and len(high) < len(page.data)


def test_a_search_can_weigh_meaning_and_words(sdk: openai.OpenAI) -> None:
    store = sdk.vector_stores.create()
    sdk.vector_stores.file_batches.upload_and_poll(store.id, files=[(n, t.encode()) for n, t in PLANETS.items()])

    def found(**weights: float) -> list[str]:
        options = {"hybrid_search": weights}
        return [hit.content[0].text for hit in sdk.vector_stores.search(store.id, query="red", ranking_options=options)]

    by_words = found(embedding_weight=0, text_weight=1)
    assert by_words and all("red" in text.lower() for text in by_words)
    assert len(found(embedding_weight=1, text_weight=0)) > len(by_words)


def test_chunk_sizes_are_kept_per_file(sdk: openai.OpenAI, opened: Opened) -> None:
    text = " ".join(f"Sentence number {i} is here." for i in range(60))
    own, default = upload(sdk, "own.txt", text), upload(sdk, "default.txt", text + " End.")
    sizes = {"max_chunk_size_tokens": 200, "chunk_overlap_tokens": 0}
    store = sdk.vector_stores.create(file_ids=[own], chunking_strategy={"type": "static", "static": sizes})
    sdk.vector_stores.files.create(store.id, file_id=default, chunking_strategy={"type": "auto"})
    files = [sdk.vector_stores.files.poll(f, vector_store_id=store.id) for f in (own, default)]
    assert files[0].chunking_strategy.static.model_dump() == sizes
    assert files[1].chunking_strategy.static.max_chunk_size_tokens == opened.live.chunking.chunk_tokens
    lengths = [
        [c.chunk.num_tokens for c in opened.catalogue.chunks(store.id) if c.chunk.document_id == f]
        for f in (own, default)
    ]
    assert 64 < max(lengths[0]) <= 200 and max(lengths[1]) <= 64


def test_stores_are_listed_both_ways_and_can_be_deleted_meanwhile(sdk: openai.OpenAI) -> None:
    ids = [sdk.vector_stores.create(name=str(n)).id for n in range(5)]
    assert [s.id for s in sdk.vector_stores.list(order="asc", limit=2)] == ids
    page = sdk.vector_stores.list(limit=2, before=ids[0])
    assert [s.id for s in page.data] == [ids[2], ids[1]] and page.has_more
    for store in sdk.vector_stores.list(limit=2):
        sdk.vector_stores.delete(store.id)
    assert sdk.vector_stores.list().data == []


def test_a_store_is_updated_only_where_told(sdk: openai.OpenAI) -> None:
    expiry = {"anchor": "last_active_at", "days": 3}
    store = sdk.vector_stores.create(name="a", metadata={"k": "v"}, expires_after=expiry)
    assert store.expires_at == store.last_active_at + 3 * 86_400
    renamed = sdk.vector_stores.update(store.id, name="b")
    assert (renamed.name, renamed.metadata, renamed.expires_after.days) == ("b", {"k": "v"}, 3)
    cleared = sdk.vector_stores.update(store.id, metadata=None, expires_after=None)
    assert (cleared.name, cleared.metadata, cleared.expires_after, cleared.expires_at) == ("b", {}, None, None)


def test_an_expired_store_says_so_and_refuses_to_be_used(sdk: openai.OpenAI, opened: Opened) -> None:
    file_id = upload(sdk, "a.txt")
    store = sdk.vector_stores.create(expires_after={"anchor": "last_active_at", "days": 1})
    with opened.catalogue.database.write() as connection:
        connection.execute("UPDATE collections SET last_active_at = ?", (int(time.time()) - 86_401,))
    assert sdk.vector_stores.retrieve(store.id).status == "expired"
    for use in (
        lambda: sdk.vector_stores.search(store.id, query="x"),
        lambda: sdk.vector_stores.update(store.id, name="y"),
        lambda: sdk.vector_stores.files.create(store.id, file_id=file_id),
        lambda: sdk.vector_stores.file_batches.create(store.id, file_ids=[file_id]),
    ):
        with pytest.raises(openai.BadRequestError, match="has expired") as refused:
            use()
        assert refused.value.param == "vector_store_id"
    assert sdk.vector_stores.delete(store.id).deleted


# files on their way in


async def test_a_file_under_way_tells_how_far_it_is(client: httpx.AsyncClient, opened: Opened) -> None:
    opened.ingestion.is_held = True
    file_id, store = await uploaded(client), await made(client)
    attached = await client.post(f"{STORES}/{store}/files", json={"file_id": file_id})
    assert attached.headers["openai-poll-after-ms"].isdigit()
    assert (attached.json()["status"], attached.json()["fusionrag"]) == ("in_progress", None)
    opened.ingestion.show(store, file_id, IngestProgress(1, 1, 1, 3, 4, "embedding"))
    file = (await client.get(f"{STORES}/{store}/files/{file_id}")).json()
    assert file["fusionrag"] == {"stage": "embedding", "progress": 0.75}
    assert (await client.get(f"{STORES}/{store}")).json()["status"] == "in_progress"
    found = await client.post(f"{STORES}/{store}/search", json={"query": "text"})
    assert found.json()["data"] == []


async def test_a_file_taken_back_before_it_is_read_never_appears(client: httpx.AsyncClient, opened: Opened) -> None:
    opened.ingestion.is_held = True
    detached, deleted, cancelled, kept = [await uploaded(client, text=f"Text {n}.") for n in range(4)]
    store = await made(client, file_ids=[detached, deleted])
    body = {"file_ids": [cancelled]}
    batch = (await client.post(f"{STORES}/{store}/file_batches", json=body)).json()["id"]
    await client.delete(f"{STORES}/{store}/files/{detached}")
    await client.delete(f"/v1/files/{deleted}")
    reply = (await client.post(f"{STORES}/{store}/file_batches/{batch}/cancel")).json()
    assert (reply["status"], reply["file_counts"]["cancelled"]) == ("cancelled", 1)
    opened.ingestion.is_held = False
    await client.post(f"{STORES}/{store}/files", json={"file_id": kept})
    await until(lambda: opened.ingestion.outcomes["completed"] == 1)
    assert [d.document_id for d in opened.catalogue.documents(store)] == [kept]
    states = {f["id"]: f["status"] for f in (await client.get(f"{STORES}/{store}/files")).json()["data"]}
    assert states == {cancelled: "cancelled", kept: "completed"}


async def test_the_files_of_a_batch_each_have_their_own_attributes(client: httpx.AsyncClient) -> None:
    first, second, other = [await uploaded(client, text=f"Text {n}.") for n in range(3)]
    store = await made(client, file_ids=[other])
    body = {"files": [{"file_id": first, "attributes": {"n": 1}}, {"file_id": second, "attributes": {"n": 2}}]}
    batch = (await client.post(f"{STORES}/{store}/file_batches", json=body)).json()
    assert VectorStoreFileBatch.model_validate(batch, strict=True).file_counts.total == 2
    listed = (await client.get(f"{STORES}/{store}/file_batches/{batch['id']}/files?order=asc")).json()
    assert [(f["id"], f["attributes"]) for f in listed["data"]] == [(first, {"n": 1}), (second, {"n": 2})]
    assert (listed["first_id"], listed["last_id"], listed["has_more"]) == (first, second, False)
    filtered = await client.get(f"{STORES}/{store}/files?filter=cancelled")
    assert filtered.json()["data"] == []


async def test_collections_of_the_command_line_are_vector_stores_whose_documents_are_cited(
    client: httpx.AsyncClient, opened: Opened
) -> None:
    document = Document("0" * 32, "Mars", (Section("", "Mars is red."),), "planets/mars.md", {"topic": "space"})
    opened.ingestor.add_documents([document], "wiki")
    (chunk,) = opened.catalogue.chunks("wiki")
    opened.catalogue.record_kv("wiki", [KVObject("d", chunk.chunk.chunk_id, "raw", 1000)])
    store = (await client.get(f"{STORES}/wiki")).json()
    VectorStore.model_validate(store, strict=True)
    assert (store["id"], store["fusionrag"]["kv"]["raw"]) == ("wiki", 1)
    assert store["usage_bytes"] > 1000
    (hit,) = (await client.post(f"{STORES}/wiki/search", json={"query": "red"})).json()["data"]
    assert (hit["file_id"], hit["filename"], hit["attributes"]) == ("0" * 32, "planets/mars.md", {"topic": "space"})


async def test_every_reply_fits_the_official_clients_types_exactly(client: httpx.AsyncClient) -> None:
    file_id = await uploaded(client)
    store = (await client.post(STORES, json={"name": "s", "file_ids": [file_id]})).json()
    VectorStore.model_validate(store, strict=True)
    file = (await client.get(f"{STORES}/{store['id']}/files/{file_id}")).json()
    VectorStoreFile.model_validate(file, strict=True)


# faults


BAD_BODIES: list[tuple[str, dict[str, Any], str]] = [
    ("", {"name": 3}, "name"),
    ("", {"name": "x" * 257}, "name"),
    ("", {"nmae": "x"}, "nmae"),
    ("", {"metadata": {"k": 1}}, "metadata"),
    ("", {"metadata": {f"k{i}": "v" for i in range(17)}}, "metadata"),
    ("", {"metadata": {"k" * 65: "v"}}, "metadata"),
    ("", {"metadata": {"k": "v" * 513}}, "metadata"),
    ("", {"file_ids": "file-1"}, "file_ids"),
    ("", {"expires_after": {"anchor": "created_at", "days": 1}}, "expires_after.anchor"),
    ("", {"expires_after": {"anchor": "last_active_at", "days": 0}}, "expires_after.days"),
    ("", {"chunking_strategy": {"type": "static"}}, "chunking_strategy"),
    (
        "",
        {"chunking_strategy": {"type": "static", "static": {"max_chunk_size_tokens": 99, "chunk_overlap_tokens": 0}}},
        "chunking_strategy.static.max_chunk_size_tokens",
    ),
    (
        "",
        {"chunking_strategy": {"type": "static", "static": {"max_chunk_size_tokens": 100, "chunk_overlap_tokens": 51}}},
        "chunking_strategy.static",
    ),
    ("/{store}", {"name": 3}, "name"),
    ("/{store}", {"file_ids": []}, "file_ids"),
    ("/{store}/files", {}, "file_id"),
    ("/{store}/files", {"file_id": "{file}", "attributes": {"a": None}}, "attributes"),
    ("/{store}/files", {"file_id": "{file}", "attributes": {"a": [1]}}, "attributes"),
    ("/{store}/files", {"file_id": "{file}", "attributes": {"a": 10**400}}, "attributes"),
    ("/{store}/files", {"file_id": "{file}", "attributes": {"": "x"}}, "attributes"),
    ("/{store}/files/{file}", {}, "attributes"),
    ("/{store}/file_batches", {"file_ids": []}, "file_ids"),
    ("/{store}/file_batches", {"files": [{"id": "x"}]}, "files.0.file_id"),
    ("/{store}/search", {}, "query"),
    ("/{store}/search", {"query": " "}, "query"),
    ("/{store}/search", {"query": []}, "query"),
    ("/{store}/search", {"query": ["a", 1]}, "query.1"),
    ("/{store}/search", {"query": "x", "max_num_results": 51}, "max_num_results"),
    ("/{store}/search", {"query": "x", "rewrite_query": True}, "rewrite_query"),
    ("/{store}/search", {"query": "x", "ranking_options": {"score_threshold": 1.1}}, "ranking_options.score_threshold"),
    ("/{store}/search", {"query": "x", "filters": {"type": "eq", "key": 1, "value": 1}}, "filters.key"),
    ("/{store}/search", {"query": "x", "filters": {"type": "gt", "key": "a", "value": None}}, "filters.value"),
    (
        "/{store}/search",
        {"query": "x", "filters": {"type": "and", "filters": [{"type": "near"}]}},
        "filters.filters[0]",
    ),
    ("/{store}/search", {"query": "x", "filters": "a = 1"}, "filters"),
]


@pytest.mark.parametrize(("path", "body", "param"), BAD_BODIES)
async def test_a_wrong_field_is_refused_by_name(
    client: httpx.AsyncClient, opened: Opened, path: str, body: dict[str, Any], param: str
) -> None:
    opened.ingestion.is_held = True
    file_id = await uploaded(client)
    store = await made(client, file_ids=[file_id])
    body = {key: file_id if value == "{file}" else value for key, value in body.items()}
    reply = await client.post(STORES + path.format(store=store, file=file_id), json=body)
    error = reply.json()["error"]
    assert (reply.status_code, error["type"]) == (400, "invalid_request_error"), error
    assert error["param"] is not None and error["param"].startswith(param), error


@pytest.mark.parametrize(
    "body",
    [{}, {"file_ids": ["{file}"], "files": [{"file_id": "{file}"}]}, {"files": [{"file_id": "f"}], "attributes": {}}],
)
async def test_a_batch_names_its_files_in_one_way(client: httpx.AsyncClient, body: dict[str, Any]) -> None:
    store = await made(client)
    reply = await client.post(f"{STORES}/{store}/file_batches", json=body)
    assert reply.status_code == 400 and "files" in reply.json()["error"]["message"]


@pytest.mark.parametrize("query", ["limit=101", "limit=x", "order=new", "after=1", "before=vs", "filter=done", "a=b"])
async def test_a_list_asked_for_wrongly_is_refused_by_name(client: httpx.AsyncClient, query: str) -> None:
    store = await made(client)
    reply = await client.get(f"{STORES}/{store}/files?{query}")
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, query.partition("=")[0])


# two owners


@pytest.fixture
async def tenants(opened: Opened) -> AsyncIterator[tuple[httpx.AsyncClient, dict[str, str], dict[str, str]]]:
    """The app with two keys; the headers of alice and of bob."""
    keys = ApiKeys(opened.catalogue)
    alice, bob = ({"Authorization": f"Bearer {keys.add(name)}"} for name in ("alice", "bob"))
    async with open_app(EchoRag(), CONFIG, live=opened.live, keys=keys) as client:
        yield client, alice, bob


Tenants = tuple[httpx.AsyncClient, dict[str, str], dict[str, str]]
NOBODYS = {"file": "file-" + "0" * 24, "store": "vs_" + "0" * 24, "batch": "vsfb_" + "0" * 24}

# (method, path, body); {…}: whose id is tried out; [store], [file]: bob's own
ATTEMPTS: list[tuple[str, str, Any]] = [
    ("GET", "/v1/files/{file}", None),
    ("DELETE", "/v1/files/{file}", None),
    ("GET", "/v1/files/{file}/content", None),
    ("POST", STORES, {"file_ids": ["[file]", "{file}"]}),
    ("GET", STORES + "/{store}", None),
    ("POST", STORES + "/{store}", {"name": "mine"}),
    ("DELETE", STORES + "/{store}", None),
    ("POST", STORES + "/{store}/search", {"query": "secret"}),
    ("GET", STORES + "/{store}/files", None),
    ("POST", STORES + "/{store}/files", {"file_id": "[file]"}),
    ("POST", STORES + "/[store]/files", {"file_id": "{file}"}),
    ("GET", STORES + "/{store}/files/{file}", None),
    ("GET", STORES + "/[store]/files/{file}", None),
    ("POST", STORES + "/{store}/files/{file}", {"attributes": {}}),
    ("POST", STORES + "/[store]/files/{file}", {"attributes": {}}),
    ("DELETE", STORES + "/{store}/files/{file}", None),
    ("DELETE", STORES + "/[store]/files/{file}", None),
    ("GET", STORES + "/{store}/files/{file}/content", None),
    ("GET", STORES + "/[store]/files/{file}/content", None),
    ("POST", STORES + "/{store}/file_batches", {"file_ids": ["[file]"]}),
    ("POST", STORES + "/[store]/file_batches", {"file_ids": ["[file]", "{file}"]}),
    ("POST", STORES + "/[store]/file_batches", {"files": [{"file_id": "{file}"}]}),
    ("GET", STORES + "/{store}/file_batches/{batch}", None),
    ("GET", STORES + "/[store]/file_batches/{batch}", None),
    ("POST", STORES + "/{store}/file_batches/{batch}/cancel", None),
    ("POST", STORES + "/[store]/file_batches/{batch}/cancel", None),
    ("GET", STORES + "/{store}/file_batches/{batch}/files", None),
    ("GET", STORES + "/[store]/file_batches/{batch}/files", None),
]
LISTS = [("GET", "/v1/files"), ("GET", STORES), ("POST", "/v1/files")]


def filled(value: Any, tried: dict[str, str], own: dict[str, str]) -> Any:
    """`value` with the ids put in."""
    if isinstance(value, dict):
        return {key: filled(item, tried, own) for key, item in value.items()}
    if isinstance(value, list):
        return [filled(item, tried, own) for item in value]
    if isinstance(value, str):
        value = re.sub(r"\{(\w+)\}", lambda m: tried[m[1]], value)
        return re.sub(r"\[(\w+)\]", lambda m: own[m[1]], value)
    return value


def test_every_route_of_files_and_vector_stores_is_tried(opened: Opened) -> None:
    from server.app import create_app
    from server.worker import Worker

    rag = EchoRag()
    app = create_app(rag, Worker(rag.engine), CONFIG, opened.live)
    names = {"file_id": "file", "vector_store_id": "store", "batch_id": "batch"}
    served = {
        (method, re.sub(r"\{(\w+)\}", lambda m: "{" + names[m[1]] + "}", path))
        for path, methods in app.openapi()["paths"].items()
        for method in map(str.upper, methods)
        if path.startswith(("/v1/files", STORES))
    }
    tried = {(method, path.replace("[", "{").replace("]", "}")) for method, path, _ in ATTEMPTS}
    assert served == tried | set(LISTS)


@pytest.mark.parametrize(("method", "path", "body"), ATTEMPTS)
async def test_a_stranger_gets_what_an_id_of_nothing_gets(
    tenants: Tenants, opened: Opened, method: str, path: str, body: Any
) -> None:
    client, alice, bob = tenants
    ids = []
    for headers in (alice, bob):
        file_id = await uploaded(client, "secret.txt", "The secret is 42.", **headers)
        store = await made(client, headers, name="Secrets")
        batches = f"{STORES}/{store}/file_batches"
        batch = (await client.post(batches, json={"file_ids": [file_id]}, headers=headers)).json()["id"]
        ids.append({"file": file_id, "store": store, "batch": batch})
    await until(lambda: opened.ingestion.outcomes["completed"] == 2)
    theirs, own = ids
    replies = []
    for tried in (theirs, NOBODYS):
        reply = await client.request(method, filled(path, tried, own), json=filled(body, tried, own), headers=bob)
        text = reply.text
        for kind in tried:
            text = text.replace(tried[kind], kind)
        replies.append((reply.status_code, text, set(reply.headers) - {"x-request-id"}))
    assert replies[0] == replies[1]
    assert replies[0][0] == 404
    assert await everything(client, alice, theirs) == (["secret.txt"], ["Secrets"], 1, ["The secret is 42."])
    assert await everything(client, bob, own) == (["secret.txt"], ["Secrets"], 1, ["The secret is 42."])


async def everything(client: httpx.AsyncClient, headers: dict[str, str], ids: dict[str, str]) -> tuple[Any, ...]:
    """What an owner has: names of files and stores, completed files, what is found."""
    files = (await client.get("/v1/files", headers=headers)).json()["data"]
    stores = (await client.get(STORES, headers=headers)).json()["data"]
    found = await client.post(f"{STORES}/{ids['store']}/search", json={"query": "secret"}, headers=headers)
    return (
        [f["filename"] for f in files],
        [s["name"] for s in stores],
        sum(s["file_counts"]["completed"] for s in stores),
        [hit["content"][0]["text"] for hit in found.json()["data"]],
    )


async def test_without_a_key_nothing_is_told(tenants: Tenants) -> None:
    client, *_ = tenants
    for method, path, body in [*ATTEMPTS, *((m, p, None) for m, p in LISTS)]:
        assert (await client.request(method, filled(path, NOBODYS, NOBODYS), json=body)).status_code == 401
