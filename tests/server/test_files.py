"""/v1/files: what is sent is what is kept, and what cannot be kept is refused with the reason and leaves nothing."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fusionrag.errors import RequestError
from index import Catalogue, DataDir, StorageFull
from index.files import Files
from server.config import ServerConfig
from server.uploads import FormParts
from tests.server.echo_rag import EchoRag, LiveServer, eventually, open_app, until
from tests.server.live_collections import Opened

pytestmark = pytest.mark.anyio

HERE = Path(__file__).parent
MAX_FILE_BYTES = 1 << 20
CONFIG = ServerConfig(drain_timeout_s=0, max_file_bytes=MAX_FILE_BYTES)
NOBODYS = "file-" + "0" * 24


@pytest.fixture
def config() -> ServerConfig:
    return CONFIG


@pytest.fixture
async def client(opened: Opened) -> AsyncIterator[httpx.AsyncClient]:
    async with open_app(EchoRag(), CONFIG, live=opened.live) as client:
        yield client


def names_on_disk(opened: Opened) -> list[str]:
    return sorted(path.name for path in opened.data_dir.files.iterdir())


def test_the_official_client_uploads_lists_reads_and_deletes(sdk: openai.OpenAI) -> None:
    made = [sdk.files.create(file=(f"{n}.txt", b"x" * n), purpose="user_data") for n in (1, 2, 3)]
    assert [(f.filename, f.bytes, f.purpose, f.status, f.object) for f in made[:1]] == [
        ("1.txt", 1, "user_data", "processed", "file")
    ]
    other = sdk.files.create(file=("notes.md", "ä\r\n--b\r\n".encode()), purpose="assistants")
    assert sdk.files.retrieve(other.id) == other
    assert sdk.files.content(other.id).content == "ä\r\n--b\r\n".encode()
    assert [f.id for f in sdk.files.list()] == [other.id] + [f.id for f in made[::-1]]
    assert [f.id for f in sdk.files.list(purpose="user_data", order="asc")] == [f.id for f in made]
    assert [f.id for f in sdk.files.list(limit=1)] == [other.id] + [f.id for f in made[::-1]]
    assert sdk.files.delete(other.id).deleted
    with pytest.raises(openai.NotFoundError, match=other.id):
        sdk.files.retrieve(other.id)


async def test_the_async_client_uploads_several_at_once(server: LiveServer) -> None:
    async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        contents = [bytes([65 + i]) * 300_000 for i in range(8)]
        made = await asyncio.gather(*(client.files.create(file=("a.txt", c), purpose="assistants") for c in contents))
        read = await asyncio.gather(*(client.files.content(f.id) for f in made))
    assert [r.content for r in read] == contents


def test_all_files_can_be_deleted_while_they_are_listed_page_by_page(sdk: openai.OpenAI) -> None:
    for n in range(5):
        sdk.files.create(file=(f"{n}.txt", b"x"), purpose="assistants")
    for file in sdk.files.list(limit=2):
        sdk.files.delete(file.id)
    assert list(sdk.files.list()) == []


def test_a_file_may_be_given_an_end(sdk: openai.OpenAI) -> None:
    expiry = {"anchor": "created_at", "seconds": 3600}
    file = sdk.files.create(file=("a.txt", b"x"), purpose="assistants", expires_after=expiry)
    assert file.expires_at == file.created_at + 3600


@pytest.mark.parametrize(
    ("form", "param", "words"),
    [
        ({"purpose": (None, "fine-tune"), "file": ("a.txt", b"x")}, "purpose", "'assistants' or 'user_data'"),
        ({"file": ("a.txt", b"x")}, "purpose", "required"),
        ({"purpose": (None, "assistants")}, "file", "is missing"),
        ({"purpose": (None, "assistants"), "file": ("a.txt", b"")}, "file", "is empty"),
        ({"purpose": (None, "assistants"), "file": (None, b"x")}, "file", "with a file name"),
        ({"purpose": (None, "assistants"), "file": ("..", b"x"), "model": (None, "m")}, "model", "unknown parameter"),
        ({"purpose": (None, "assistants"), "file": ("n" * 256, b"x")}, "file", "1 to 255 characters"),
        ({"purpose": (None, "assistants"), "document": ("a.txt", b"x")}, "document", "must not be a file"),
        ({"purpose": (None, "a" * 2000), "file": ("a.txt", b"x")}, "purpose", "more than 1024 bytes"),
        (
            {
                "purpose": (None, "assistants"),
                "expires_after[anchor]": (None, "created_at"),
                "expires_after[seconds]": (None, "60"),
                "file": ("a.txt", b"x"),
            },
            "expires_after.seconds",
            "3600",
        ),
    ],
)
async def test_a_form_with_a_fault_is_refused_by_the_fields_name_and_nothing_is_kept(
    client: httpx.AsyncClient, opened: Opened, form: dict[str, tuple[str | None, object]], param: str, words: str
) -> None:
    reply = await client.post("/v1/files", files=form)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error")
    assert words in error["message"]
    assert names_on_disk(opened) == []


async def test_two_files_or_one_field_twice_are_refused(client: httpx.AsyncClient, opened: Opened) -> None:
    for twice in ([("file", ("a.txt", b"x"))] * 2, [("purpose", (None, "assistants"))] * 2):
        reply = await client.post("/v1/files", files=twice)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, twice[0][0])
        assert "is there twice" in reply.json()["error"]["message"]
    assert names_on_disk(opened) == []


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("application/json", b'{"purpose": "assistants"}'),
        ("multipart/form-data", b""),
        ("multipart/form-data; boundary=b", b""),
        ("multipart/form-data; boundary=b", b"no form at all"),
        ("multipart/form-data; boundary=" + "b" * 300, b"x"),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nx',
        ),
        ("multipart/form-data; boundary=b", b"--b\r\n" + b"X-A: b\r\n" * 100 + b"\r\nx\r\n--b--\r\n"),
    ],
)
async def test_a_body_that_is_no_whole_form_is_refused(
    client: httpx.AsyncClient, opened: Opened, content_type: str, body: bytes
) -> None:
    reply = await client.post("/v1/files", content=body, headers={"Content-Type": content_type})
    assert reply.status_code == 400 and "form" in reply.json()["error"]["message"]
    assert names_on_disk(opened) == []


@pytest.mark.parametrize("num_megabytes", [2, 40])
def test_a_file_that_is_too_long_is_refused_in_a_way_the_official_client_can_read(
    sdk: openai.OpenAI, opened: Opened, num_megabytes: int
) -> None:
    with pytest.raises(openai.APIStatusError) as refused:
        sdk.files.create(file=("a.txt", b"x" * (num_megabytes << 20)), purpose="assistants")
    assert refused.value.status_code == 413
    assert names_on_disk(opened) == []


def test_a_file_may_have_exactly_the_limit(sdk: openai.OpenAI) -> None:
    file = sdk.files.create(file=("a.txt", b"x" * MAX_FILE_BYTES), purpose="assistants")
    assert file.bytes == MAX_FILE_BYTES
    with pytest.raises(openai.APIStatusError, match=str(MAX_FILE_BYTES)) as refused:
        sdk.files.create(file=("a.txt", b"x" * (MAX_FILE_BYTES + 1)), purpose="assistants")
    assert refused.value.status_code == 413


@pytest.mark.parametrize("length", [b"Transfer-Encoding: chunked", b"Content-Length: 99999999999"])
def test_a_length_that_lies_or_is_not_told_does_not_lift_the_limit(
    server: LiveServer, opened: Opened, length: bytes
) -> None:
    part = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.txt"\r\n\r\n'
    head = b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=b\r\n"
    data = b"x" * 65_536
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=10) as connection:
        connection.sendall(head + length + b"\r\n\r\n")
        try:
            for block in [part] + [data] * 1000:
                connection.sendall(b"%x\r\n%s\r\n" % (len(block), block) if length.endswith(b"chunked") else block)
        except ConnectionError:
            pass  # it has heard enough
        reply = connection.recv(4096)
    assert reply.startswith(b"HTTP/1.1 413 ")
    eventually(lambda: names_on_disk(opened) == [])


def test_a_client_that_hangs_up_in_the_middle_leaves_nothing(server: LiveServer, opened: Opened) -> None:
    head = b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900000\r\n"
    part = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.txt"\r\n\r\n'
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=10) as connection:
        connection.sendall(head + b"Content-Type: multipart/form-data; boundary=b\r\n\r\n" + part + b"x" * 600_000)
        eventually(lambda: any(name.endswith(".tmp") for name in names_on_disk(opened)))
    eventually(lambda: names_on_disk(opened) == [])


async def test_other_routes_keep_their_own_limit(opened: Opened) -> None:
    config = ServerConfig(drain_timeout_s=0, max_body_bytes=1000)
    async with open_app(EchoRag(), config, live=opened.live) as client:
        form = {"purpose": (None, "assistants"), "file": ("a.txt", b"x" * 5000)}
        assert (await client.post("/v1/files", files=form)).status_code == 200
        assert (await client.post("/v1/vector_stores", json={"name": "x" * 5000})).status_code == 413


@pytest.mark.parametrize(
    "path", [f"/v1/files/{NOBODYS}", f"/v1/files/{NOBODYS}/content", "/v1/files/..%2fcatalogue.sqlite"]
)
async def test_an_unknown_file_is_not_found(client: httpx.AsyncClient, path: str) -> None:
    for method in ("GET", "DELETE"):
        reply = await client.request(method, path)
        assert reply.status_code == (405 if (method, path[-7:]) == ("DELETE", "content") else 404)
        assert reply.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("query", "param"),
    [("limit=0", "limit"), ("limit=10001", "limit"), ("order=up", "order"), ("after=x", "after"), ("page=2", "page")],
)
async def test_a_list_asked_for_wrongly_is_refused_by_name(client: httpx.AsyncClient, query: str, param: str) -> None:
    reply = await client.get(f"/v1/files?{query}")
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


async def test_an_empty_list_has_openais_shape(client: httpx.AsyncClient) -> None:
    expected = {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}
    assert (await client.get("/v1/files")).json() == expected


async def test_files_that_expired_while_nothing_ran_are_gone_soon_after_the_start(opened: Opened) -> None:
    files = opened.live.library.files
    incoming = files.begin()
    incoming.write(b"x")
    files.keep(incoming, "", "a.txt", "assistants", expires_after_s=-1)
    assert len(names_on_disk(opened)) == 1
    async with open_app(EchoRag(), CONFIG, live=opened.live):
        await until(lambda: names_on_disk(opened) == [])


async def test_without_live_collections_the_routes_are_not_there() -> None:
    async with open_app(EchoRag()) as client:
        for path in ("/v1/files", "/v1/vector_stores"):
            assert (await client.get(path)).status_code == 404


def test_what_one_owner_may_keep_is_limited_and_says_so(tmp_path: Path) -> None:
    data_dir = DataDir(tmp_path)
    with Catalogue(data_dir.catalogue) as catalogue:
        files = Files(catalogue, data_dir, max_owner_bytes=100)

        def keep(owner: str, num_bytes: int) -> str:
            upload = files.begin()
            upload.write(b"x" * num_bytes)
            return files.keep(upload, owner, "a.txt", "assistants").id

        first = keep("ada", 60)
        keep("ada", 40)
        keep("ben", 100)  # others have a limit of their own
        with pytest.raises(StorageFull, match=r"100 of the 100 bytes.*has 1;"):
            keep("ada", 1)
        assert len(list(data_dir.files.iterdir())) == 3, "what is refused leaves nothing"
        files.delete(first, "ada")
        keep("ada", 60)


@pytest.mark.slow  # it imports everything once more
def test_an_upload_to_a_full_disk_gets_507_and_leaves_nothing(tmp_path: Path) -> None:
    unshare = shutil.which("unshare")
    mounted = f"mount -t tmpfs -o size=3m tmpfs {tmp_path}"  # gone with its namespace
    if unshare is None or subprocess.run([unshare, "-rm", "sh", "-c", mounted], capture_output=True).returncode:
        pytest.skip("no small file system can be mounted here (needs unshare and user namespaces)")
    script = f"{mounted} && '{sys.executable}' -m tests.server.upload_to_full_disk {tmp_path}"
    done = subprocess.run(
        [unshare, "-rm", "sh", "-c", script], capture_output=True, text=True, cwd=HERE.parents[1], timeout=120
    )
    assert done.returncode == 0, done.stderr
    large, files_then, small, files_now = json.loads(done.stdout)
    assert (large["status"], large["error"]["code"], large["error"]["type"]) == (507, "storage_full", "server_error")
    assert str(tmp_path) not in large["error"]["message"]
    assert (files_then, small, files_now) == (0, 200, 1)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.lists(st.sampled_from([b"\r\n", b"--b", b"\r\n--b", b"--", b"-", b"\r", b"x" * 50, b"\0"])).map(
        b"".join
    ),
    cuts=st.lists(st.integers(1, 40), max_size=30),
    file_first=st.booleans(),
)
def test_however_a_form_is_cut_in_pieces_the_file_comes_out_byte_for_byte(
    content: bytes, cuts: list[int], file_first: bool
) -> None:
    boundary = b"bound"
    file = b'Content-Disposition: form-data; name="file"; filename="a\xc3\xa4.txt"\r\nContent-Type: text/plain\r\n\r\n'
    parts = [file + content, b'content-disposition: form-data; name="purpose"\r\n\r\nassistants']
    body = b"".join(b"--" + boundary + b"\r\n" + p + b"\r\n" for p in (parts if file_first else parts[::-1]))
    body += b"--" + boundary + b"--\r\n"
    written = bytearray()
    form = FormParts(boundary, 1 << 20, written.extend)
    for cut in cuts:
        form.feed(body[:cut])
        body = body[cut:]
    form.feed(body)
    if b"\r\n--" + boundary not in b"\r\n" + content:
        received = form.received()
        assert bytes(written) == content
        assert (received.filename, received.fields) == ("aä.txt", {"purpose": "assistants"})


@settings(max_examples=200)
@given(st.binary(max_size=400))
def test_whatever_bytes_arrive_the_form_is_read_or_refused(data: bytes) -> None:
    form = FormParts(b"b", 100, lambda block: None)
    with pytest.raises(RequestError):
        form.feed(b"--b\r\n" + data)
        form.received()
