"""What strangers, floods, malformed bytes and failures meet."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import time

import httpx
import pytest

from fusionrag.errors import ConfigError
from server.app import create_app
from server.config import ServerConfig
from server.worker import Worker
from tests.server.echo_rag import MODEL, EchoEngine, EchoRag, chat, eventually, open_app, serving, until

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}
HEAD = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
LOCKED = ServerConfig(api_key="sk-secret", drain_timeout_s=0)


def error_of(reply: httpx.Response, status: int) -> dict:
    assert reply.status_code == status, reply.text
    assert list(reply.json()) == ["error"]
    assert list(reply.json()["error"]) == ["message", "type", "param", "code"]
    assert reply.json()["error"]["code"] is None or isinstance(reply.json()["error"]["code"], str)
    return reply.json()["error"]


TRICKS = [
    ("POST", "/health"),
    ("GET", "/health/../metrics"),
    ("GET", "/health/"),
    ("GET", "/HEALTH"),
]
TRICKS += [("GET", "/assets"), ("GET", "/%6detrics"), ("OPTIONS", CHAT), ("GET", "/v1/models?x=/health")]


def all_routes() -> list[tuple[str, str]]:
    """Those that do not need a data directory; of all others: test_tenants."""
    rag = EchoRag()
    routes = create_app(rag, Worker(rag.engine), LOCKED).routes
    examples = {"{model:path}": MODEL, "{name}": "app.js"}
    return [
        (method, re.sub(r"\{.*?\}", lambda found: examples.get(found[0], "an-id"), route.path))
        for route in routes
        for method in sorted(route.methods)
    ]


@pytest.mark.parametrize("method, path", [*all_routes(), ("GET", "/nowhere"), *TRICKS])
@pytest.mark.parametrize("key", [None, "Bearer wrong", "Bearer sk-secret2", "sk-secret", "Bearer \xff"])
async def test_nothing_but_probes_and_the_page_answers_without_the_key(
    rag: EchoRag, method: str, path: str, key: str | None
) -> None:
    headers = {"Authorization": key.encode("latin-1")} if key else {}
    async with open_app(rag, LOCKED) as client:
        reply = await client.request(method, path, headers=headers)
    if path in ("/", "/health", "/ready", "/assets/app.js") and method in ("GET", "HEAD"):
        assert reply.status_code == 200
    elif method == "HEAD":
        assert reply.status_code == 401
    else:
        assert error_of(reply, 401)["code"] == "invalid_api_key"
        assert reply.headers["www-authenticate"] == "Bearer"
    assert rag.questions == []


async def test_the_key_opens_every_route(rag: EchoRag) -> None:
    async with open_app(rag, LOCKED) as client:
        client.headers["Authorization"] = "Bearer sk-secret"
        assert (await client.post(CHAT, json=chat())).status_code == 200
        for path in ("/v1/models", "/metrics", "/openapi.json"):
            assert (await client.get(path)).status_code == 200


def test_a_configuration_that_is_printed_does_not_show_the_key() -> None:
    assert "sk-secret" not in repr(LOCKED)


@pytest.mark.parametrize(
    "field, value",
    [
        ("port", 70000),
        ("api_key", "two words"),
        ("api_key", "schlüssel"),
        ("max_body_bytes", 0),
        ("body_timeout_s", 0),
        ("request_timeout_s", -1),
        ("keep_alive_s", 0),
        ("drain_timeout_s", -1),
        ("num_prepare_threads", 0),
        ("max_connections", 0),
        ("max_owner_bytes", -1),
    ],
)
def test_a_bad_knob_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^{field}: "):
        ServerConfig(**{field: value})


async def test_unknown_routes_and_methods_answer_in_openais_shape(client: httpx.AsyncClient) -> None:
    error_of(await client.get("/nowhere"), 404)
    reply = await client.get(CHAT)
    error_of(reply, 405)
    assert reply.headers["allow"] == "POST"


@pytest.mark.parametrize(
    "body, says",
    [
        (b"", "JSON object"),
        (b"[]", "JSON object"),
        (b'{"model": ', "not valid JSON"),
        (b"[" * 50_000, "parsing the body"),
        (b"\xff\xfe{}", "JSON"),
        (json.dumps(chat("half \ud800 pair")).encode(), "surrogate"),
        (json.dumps(chat() | {"\udfff": 1}).encode(), "surrogate"),
        (json.dumps(chat(temperature=float("nan"))).encode(), "temperature"),
        (json.dumps(chat()).encode()[:-1] + b', "max_tokens": ' + b"9" * 5000 + b"}", "parsing the body"),
        (json.dumps(chat()).encode()[:-1] + b', "temperature": 1e999}', "temperature"),
        (json.dumps(chat(seed=2**63)).encode(), "seed"),
    ],
)
async def test_malformed_bytes_are_the_clients_fault(client: httpx.AsyncClient, body: bytes, says: str) -> None:
    assert says in error_of(await client.post(CHAT, content=body, headers=JSON), 400)["message"]


async def test_a_deeply_nested_body_is_the_clients_fault(client: httpx.AsyncClient) -> None:
    """Parsing, checking and validating reach the interpreter's recursion limit at different depths."""
    for depth in (*range(850, 1000), 3000):
        body = b'{"model": "m", "messages": ' + b'{"a":' * depth + b"1" + b"}" * (depth + 1)
        error_of(await client.post(CHAT, content=body, headers=JSON), 400)


async def test_a_body_of_another_type_is_refused_with_the_remedy(client: httpx.AsyncClient) -> None:
    """A web page of another origin can post text, but not JSON."""
    reply = await client.post(CHAT, content=json.dumps(chat()), headers={"Content-Type": "text/plain"})
    assert "Content-Type" in error_of(reply, 400)["message"]


@pytest.mark.parametrize("announced", [True, False])
async def test_a_body_that_is_too_long_is_refused_with_and_without_a_length(rag: EchoRag, announced: bool) -> None:
    body = json.dumps(chat("word " * 1000)).encode()

    async def in_pieces():
        for at in range(0, len(body), 100):
            yield body[at : at + 100]

    for limit, status in ((len(body), 400), (len(body) - 1, 413)):  # 400: the prompt is too long for the model
        with serving(rag, ServerConfig(max_body_bytes=limit, drain_timeout_s=0)) as server:
            content = body if announced else in_pieces()
            async with httpx.AsyncClient(base_url=server.url) as client:
                reply = await client.post(CHAT, content=content, headers=JSON)
        error_of(reply, status)


async def test_a_client_that_sends_its_body_too_slowly_is_let_go(rag: EchoRag) -> None:
    with serving(rag, ServerConfig(body_timeout_s=0.1, drain_timeout_s=0)) as server:
        answer = await asyncio.to_thread(raw, server.url, HEAD % (CHAT.encode(), 100) + b"{")
    assert answer.startswith(b"HTTP/1.1 408 ")


async def test_a_request_head_that_is_too_long_is_refused(rag: EchoRag) -> None:
    with serving(rag, ServerConfig(max_header_bytes=1024, drain_timeout_s=0)) as server:
        head = b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 2048
        answer = await asyncio.to_thread(raw, server.url, head)
    assert answer.startswith(b"HTTP/1.1 400 ")


def raw(url: str, sent: bytes) -> bytes:
    """What the server answers to these bytes."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(sent)
        return connection.recv(65536)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_prompt_that_is_too_long_is_refused_with_openais_code(client: httpx.AsyncClient, stream: bool) -> None:
    error = error_of(await client.post(CHAT, json=chat("word " * 65, stream=stream)), 400)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_full_queue_is_429_and_says_when_to_come_back(stream: bool) -> None:
    async with open_app(EchoRag(EchoEngine(max_queue=0))) as client:
        reply = await client.post(CHAT, json=chat(stream=stream))
    assert error_of(reply, 429)["type"] == "rate_limit_error"
    assert int(reply.headers["retry-after"]) >= 1


async def test_questions_that_wait_for_retrieval_are_bounded_too() -> None:
    rag = EchoRag(prepare_s=0.1)
    config = ServerConfig(num_prepare_threads=1, max_preparing=2, drain_timeout_s=0)
    async with open_app(rag, config) as client:
        replies = await asyncio.gather(*(client.post(CHAT, json=chat()) for _ in range(5)))
    assert sorted(r.status_code for r in replies) == [200, 200, 429, 429, 429]


@pytest.mark.parametrize("stream", [False, True])
async def test_an_unforeseen_error_is_500_without_its_cause(client: httpx.AsyncClient, caplog, stream: bool) -> None:
    reply = await client.post(CHAT, json=chat("!error", stream=stream))
    message = error_of(reply, 500)["message"]
    assert "secret" not in reply.text and "Traceback" not in reply.text
    assert reply.headers["x-request-id"] in message
    assert "secret detail of an error" in caplog.text, "the log has what the client must not see"


async def test_an_error_in_mid_stream_is_the_last_event(client: httpx.AsyncClient) -> None:
    reply = await client.post(CHAT, json=chat("a b !error", stream=True))
    assert reply.status_code == 200
    *_, last, rest = reply.text.split("\n\n")
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"
    assert rest == "" and "secret" not in reply.text


async def test_a_crash_of_the_engine_turns_health_to_503_and_leaves_the_server_readable(rag: EchoRag) -> None:
    async with open_app(rag) as client:
        assert (await client.get("/health")).json() == {"status": "ok"}
        assert error_of(await client.post(CHAT, json=chat("!crash")), 503)["code"] == "engine_down"
        reply = await client.get("/health")
        assert error_of(reply, 503)["code"] == "engine_down"
        assert "secret" not in reply.text
        error_of(await client.get("/ready"), 503)
        error_of(await client.post(CHAT, json=chat()), 503)
        assert (await client.get("/metrics")).status_code == 200
    assert len(rag.questions) == 1, "nothing is retrieved for an engine that is down"


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_takes_too_long_is_given_up_and_not_asked_again(rag: EchoRag, stream: bool) -> None:
    rag.engine.delay_s = 0.3
    async with open_app(rag, ServerConfig(request_timeout_s=0.1, drain_timeout_s=0)) as client:
        reply = await client.post(CHAT, json=chat("a b c", stream=stream))
        assert error_of(reply, 504)["code"] == "timeout"
        assert reply.headers["x-should-retry"] == "false"
        await until(lambda: len(rag.engine.cancelled) == 1)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("moment", ["retrieving", "answering"])
async def test_a_client_that_hangs_up_frees_its_request(rag: EchoRag, stream: bool, moment: str) -> None:
    rag.engine.delay_s = 0.01
    rag.prepare_s = 0.2 if moment == "retrieving" else 0.0
    with serving(rag, ServerConfig(drain_timeout_s=0)) as server:
        body = json.dumps(chat("word " * 60, stream=stream)).encode()
        connection = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])))
        connection.sendall(HEAD % (CHAT.encode(), len(body)) + body)
        eventually(lambda: rag.questions if moment == "retrieving" else rag.engine.live)
        connection.close()
        if moment == "answering":
            eventually(lambda: len(rag.engine.cancelled) == 1)
        else:
            time.sleep(0.3)
        assert rag.engine.live == {}
        assert rag.engine.num_steps < 60, "it would have run to its end"
        assert httpx.get(server.url + "/health").status_code == 200


# --- readiness ---


async def test_a_server_with_a_full_queue_is_alive_but_not_ready(rag: EchoRag) -> None:
    rag.engine.max_queue, rag.engine.delay_s = 1, 0.05
    async with open_app(rag) as client:
        assert (await client.get("/ready")).json() == {"status": "ready"}
        asking = asyncio.create_task(client.post(CHAT, json=chat("word " * 60)))
        reply = await eventually_unready(client)
        assert error_of(reply, 503)["code"] == "queue_full"
        assert int(reply.headers["retry-after"]) >= 1
        assert (await client.get("/health")).status_code == 200
        rag.engine.delay_s = 0
        assert (await asking).status_code == 200
        while (await client.get("/ready")).status_code != 200:  # the answer is out a moment before its place is free
            await asyncio.sleep(0.005)


async def eventually_unready(client: httpx.AsyncClient) -> httpx.Response:
    while (reply := await client.get("/ready")).status_code == 200:
        await asyncio.sleep(0.005)
    return reply


async def test_a_server_whose_retrieval_is_full_is_not_ready(rag: EchoRag) -> None:
    rag.prepare_s = 0.3
    async with open_app(rag, ServerConfig(num_prepare_threads=1, max_preparing=1, drain_timeout_s=0)) as client:
        asking = asyncio.create_task(client.post(CHAT, json=chat()))
        await until(lambda: rag.questions)
        assert error_of(await client.get("/ready"), 503)["code"] == "queue_full"
        await asking


def test_a_draining_server_is_alive_but_not_ready(rag: EchoRag) -> None:
    rag.engine.delay_s = 0.1
    question = chat("word " * 60, stream=True)
    with (
        serving(rag, ServerConfig(drain_timeout_s=20)) as live,
        httpx.stream("POST", live.url + CHAT, json=question) as reply,
    ):
        lines = reply.iter_lines()
        next(lines)
        live.server.handle_exit(15, None)
        eventually(lambda: httpx.get(live.url + "/ready").status_code == 503)
        late = httpx.get(live.url + "/ready")
        assert error_of(late, 503)["code"] == "draining"
        assert int(late.headers["retry-after"]) >= 1
        assert httpx.get(live.url + "/health").status_code == 200
        rag.engine.delay_s = 0


# --- what a head may ask for ---


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_can_ask_for_a_shorter_deadline_than_the_servers(rag: EchoRag, stream: bool) -> None:
    rag.engine.delay_s = 0.2
    async with open_app(rag) as client:
        reply = await client.post(CHAT, json=chat("~ ~ ~ ~ ~ a", stream=stream), headers={"X-Request-Timeout": "0.1"})
        assert error_of(reply, 504)["code"] == "timeout"
        assert "0.1 s" in reply.json()["error"]["message"]
        assert reply.headers["x-should-retry"] == "false"
        await until(lambda: len(rag.engine.cancelled) == 1)


async def test_a_stream_that_has_begun_ends_with_an_error_event_at_the_clients_deadline(rag: EchoRag) -> None:
    rag.engine.delay_s = 0.05
    async with open_app(rag) as client:
        headers = {"X-Request-Timeout": "0.3"}
        reply = await client.post(CHAT, json=chat("word " * 50, stream=True), headers=headers)
    assert reply.status_code == 200
    *_, last, _ = reply.text.split("\n\n")
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"


async def test_a_client_cannot_ask_for_more_time_than_the_server_gives(rag: EchoRag) -> None:
    rag.engine.delay_s = 0.3
    async with open_app(rag, ServerConfig(request_timeout_s=0.1, drain_timeout_s=0)) as client:
        reply = await client.post(CHAT, json=chat("a b c"), headers={"X-Request-Timeout": "600"})
    assert "0.1 s" in error_of(reply, 504)["message"]


@pytest.mark.parametrize("value", ["0", "0.0", "-1", "nan", "inf", "1e3", "soon", " 1 2", "1234567", "١"])
async def test_a_deadline_that_is_no_time_is_refused_by_the_headers_name(client: httpx.AsyncClient, value: str) -> None:
    reply = await client.get("/v1/models", headers={"X-Request-Timeout": value.encode()})
    assert error_of(reply, 400)["param"] == "X-Request-Timeout"


async def test_a_head_with_too_many_fields_is_refused(client: httpx.AsyncClient) -> None:
    fields = [(f"x-{i}", "") for i in range(90)]
    assert (await client.get("/v1/models", headers=fields)).status_code == 200
    error_of(await client.get("/v1/models", headers=[*fields, *fields]), 431)


# --- what a body may hold ---


@pytest.mark.parametrize(
    "body",
    [
        chat() | {"metadata": {str(i): "" for i in range(5000)}},
        chat() | {"documents": [{"text": "a"}] * 5000},
        chat() | {"tools": [[[1] * 4000] * 20]},
    ],
)
async def test_a_body_of_more_values_than_any_honest_one_is_refused_before_it_is_read(
    client: httpx.AsyncClient, rag: EchoRag, body: dict[str, object]
) -> None:
    reply = await client.post(CHAT, json=body)
    assert "send less at once" in error_of(reply, 400)["message"]
    assert rag.questions == []


async def test_a_body_of_many_values_is_answered(client: httpx.AsyncClient, rag: EchoRag) -> None:
    documents = [{"text": f"passage {i}"} for i in range(4000)]
    reply = await client.post(CHAT, json=chat(documents=documents))
    assert reply.status_code == 200 and len(rag.questions[0].documents) == 4000


@pytest.mark.parametrize("value, status", [(1, 200), (1.0, 200), (None, 200), (True, 400), (2, 400), ("1", 400)])
async def test_a_parameter_that_is_not_honoured_is_accepted_where_it_has_no_effect(client, value, status) -> None:
    """A number is the same number however it is spelled; a truth value is none."""
    assert (await client.post(CHAT, json=chat(n=value))).status_code == status


async def test_the_document_says_which_values_those_are(client: httpx.AsyncClient) -> None:
    schemas = (await client.get("/openapi.json")).json()["components"]["schemas"]
    assert schemas["ChatCompletionRequest"]["properties"]["n"]["enum"] == [1, None]


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
async def test_a_page_of_another_site_may_not_use_a_server_without_keys(rag: EchoRag, site: str) -> None:
    headers = {"Sec-Fetch-Site": site}
    async with open_app(rag) as client:
        assert (await client.get("/v1/models", headers=headers)).status_code == 403
        assert (await client.get("/v1/models", headers={"Sec-Fetch-Site": "same-origin"})).status_code == 200
    async with open_app(rag, ServerConfig(api_key="k", drain_timeout_s=0)) as client:
        headers["Authorization"] = "Bearer k"
        assert (await client.get("/v1/models", headers=headers)).status_code == 200


@pytest.mark.parametrize(
    ("config", "host", "status"),
    [
        ({}, "localhost:8000", 200),
        ({}, "127.0.0.1", 200),
        ({}, "[::1]:8000", 200),
        ({}, "evil.example:8000", 403),
        ({}, "localhost.evil.example", 403),
        ({"allowed_hosts": "a.example, rag.example"}, "RAG.example", 200),
        ({"allowed_hosts": "rag.example"}, "evil.example", 403),
        ({"host": "0.0.0.0"}, "rag.example", 200),
        ({"api_key": "k"}, "rag.example", 200),
    ],
)
async def test_a_server_without_keys_on_loopback_is_reached_by_its_own_names_only(
    rag: EchoRag, config: dict[str, str], host: str, status: int
) -> None:
    """Or a site could point its own name at the user's machine, and its pages would be of the server's site."""
    async with open_app(rag, ServerConfig(**config, drain_timeout_s=0)) as client:
        reply = await client.get("/v1/models", headers={"Host": host, "Authorization": "Bearer k"})
    assert reply.status_code == status
    if status == 403:
        assert "allowed_hosts" in reply.json()["error"]["message"]
