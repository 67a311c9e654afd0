"""The bytes of events, and the response that sends them for as long as somebody listens."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from server.access_log import RequestRecord
from server.errors import ClientGone, RequestTimeout
from server.sse import KEEP_ALIVE, EventStream, encode_event

pytestmark = pytest.mark.anyio


class Said(BaseModel):
    text: str


class Client:
    """The far end of an ASGI connection: keeps what is sent, hangs up when told."""

    def __init__(self) -> None:
        self.sent: list[dict] = []
        self.gone = asyncio.Event()

    async def receive(self) -> dict:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict) -> None:
        self.sent.append(message)

    @property
    def body(self) -> bytes:
        return b"".join(m.get("body", b"") for m in self.sent)


class Source:
    """Events with pauses; `closed` says whether it was told that nobody listens any more."""

    def __init__(self, *steps: bytes | float | Exception) -> None:
        self.steps, self.closed = steps, False

    async def events(self) -> AsyncGenerator[bytes, None]:
        try:
            for step in self.steps:
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, bytes):
                    yield step
                else:
                    await asyncio.sleep(step)
        finally:
            self.closed = True


async def send(source: Source, client: Client, timeout_s: float = 5.0, keep_alive_s: float = 5.0) -> None:
    response = EventStream(source.events(), timeout_s, keep_alive_s)
    scope = {"type": "http", "state": {"record": RequestRecord("id")}}
    await asyncio.wait_for(response(scope, client.receive, client.send), 5)


@given(st.text())
def test_an_event_is_one_line_of_ascii_json_and_an_empty_line(text: str) -> None:
    event = encode_event(Said(text=text))
    assert event.startswith(b"data: ") and event.endswith(b"\n\n")
    line = event[:-2].decode("ascii")
    assert line.splitlines() == [line], "clients split lines at U+0085, U+2028 and their like"
    assert json.loads(line.removeprefix("data: ")) == {"text": text}


async def test_events_are_sent_as_they_come_and_the_body_is_ended() -> None:
    client, source = Client(), Source(b"one", b"two")
    await send(source, client)
    start, *bodies = client.sent
    assert start["status"] == 200
    assert dict(start["headers"])[b"content-type"] == b"text/event-stream; charset=utf-8"
    assert [(m["body"], m["more_body"]) for m in bodies] == [(b"one", True), (b"two", True), (b"", False)]


async def test_silence_is_filled_with_comments_also_before_the_first_event() -> None:
    client = Client()
    await send(Source(0.05, b"one", 0.05, b"two"), client, keep_alive_s=0.02)
    before, between, after = (part.replace(KEEP_ALIVE, b".") for part in _split(client.body, b"one", b"two"))
    assert set(before) == set(between) == set(b".")
    assert after == b""
    assert KEEP_ALIVE.startswith(b":") and KEEP_ALIVE.endswith(b"\n\n")


def _split(body: bytes, first: bytes, second: bytes) -> tuple[bytes, bytes, bytes]:
    before, _, rest = body.partition(first)
    between, _, after = rest.partition(second)
    return before, between, after


async def test_an_error_before_the_first_event_is_left_to_the_application() -> None:
    client, source = Client(), Source(ValueError("early"))
    with pytest.raises(ValueError, match="early"):
        await send(source, client)
    assert client.sent == []


async def test_an_error_after_the_first_event_is_the_last_event() -> None:
    client = Client()
    await send(Source(b"one", ValueError("secret")), client)
    event = client.body.removeprefix(b"one")
    assert json.loads(event.removeprefix(b"data: "))["error"]["type"] == "server_error"
    assert b"secret" not in event and b"[DONE]" not in event
    assert client.sent[-1]["more_body"] is False


@pytest.mark.parametrize("steps", [(b"one", 60.0), (60.0,)])
async def test_when_the_client_hangs_up_the_events_are_closed(steps: tuple) -> None:
    client, source = Client(), Source(*steps)
    sending = asyncio.create_task(send(source, client))
    await asyncio.sleep(0.02)
    assert not source.closed
    client.gone.set()
    (result,) = await asyncio.gather(sending, return_exceptions=True)
    assert source.closed
    assert (result is None) if steps[0] == b"one" else isinstance(result, ClientGone)


async def test_when_time_is_over_the_events_are_closed_and_the_client_is_told() -> None:
    client, source = Client(), Source(b"one", 60.0)
    await send(source, client, timeout_s=0.05)
    assert source.closed
    error = json.loads(client.body.removeprefix(b"one").removeprefix(b"data: "))["error"]
    assert error["code"] == "timeout"


async def test_when_time_is_over_before_the_first_event_the_application_is_told() -> None:
    client, source = Client(), Source(60.0)
    with pytest.raises(RequestTimeout, match=r"0\.05 s"):
        await send(source, client, timeout_s=0.05)
    assert source.closed and client.sent == []


@given(st.text())
def test_a_named_event_has_its_name_on_a_line_in_front(text: str) -> None:
    assert encode_event(Said(text=text), "response.created") == b"event: response.created\n" + encode_event(
        Said(text=text)
    )


async def test_late_headers_are_asked_for_when_there_is_something_to_send() -> None:
    client, known = Client(), {}

    async def events() -> AsyncGenerator[bytes, None]:
        known["Server-Timing"] = "queue;dur=1"
        yield b"one"
        known["Server-Timing"] = "too late"

    response = EventStream(events(), 5, 5, late_headers=lambda: known)
    await response({"type": "http"}, client.receive, client.send)
    assert dict(client.sent[0]["headers"])[b"server-timing"] == b"queue;dur=1"


async def test_a_format_may_have_its_own_way_to_end_a_stream_that_failed() -> None:
    client, source = Client(), Source(b"one", RequestTimeout("given up"))
    response = EventStream(source.events(), 5, 5, failure=lambda reply: f"{reply.status} {reply.message}".encode())
    await response({"type": "http", "state": {"record": RequestRecord("id")}}, client.receive, client.send)
    assert client.body == b"one504 given up"
    assert client.sent[-1]["more_body"] is False
