"""What happens to every request before it meets a route: a record and an id, the key, the size of the body.

Plain ASGI, so that streams and disconnects pass through untouched. Deny by default: a new route needs the key.
"""

from __future__ import annotations

import asyncio
import hmac
import uuid

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server import access_log
from server.access_log import RequestRecord
from server.errors import ErrorReply, reply_for
from server.metrics import Metrics

OPEN_PATHS = ("/health",)


def _header(scope: Scope, name: bytes) -> bytes:
    return next((value for key, value in scope["headers"] if key == name), b"")


class Recorder:
    """Outermost: gives each request an id and a record, and logs and counts it when it has ended, however it ends."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = RequestRecord(uuid.uuid4().hex)
        scope.setdefault("state", {}).update(record=record, owner="")

        async def send_and_note(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", record.request_id.encode())]
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        except Exception as error:
            reply = reply_for(error, record.request_id)
            if record.status == 0:
                await reply.response()(scope, receive, send_and_note)
        finally:
            record.route = getattr(scope.get("route"), "path", record.route)
            self._metrics.observe(record)
            access_log.write(record)


class RequireKey:
    """Answers 401 to whoever does not bring the key. Compares in constant time."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self._app, self._expected = app, f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_open = scope["type"] != "http" or scope["path"] in OPEN_PATHS
        if is_open or hmac.compare_digest(_header(scope, b"authorization"), self._expected):
            await self._app(scope, receive, send)
        else:
            message = "a valid API key is needed: send it as 'Authorization: Bearer <key>'"
            headers = {"WWW-Authenticate": "Bearer"}
            reply = ErrorReply(401, message, "authentication_error", code="invalid_api_key", headers=headers)
            await reply.response()(scope, receive, send)


class LimitBody:
    """Refuses a body that is too long (413), while reading it for its length may be a lie, or too slow (408)."""

    def __init__(self, app: ASGIApp, max_body_bytes: int, timeout_s: float) -> None:
        self._app, self._max_body_bytes, self._timeout_s = app, max_body_bytes, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._timeout_s
        num_bytes, reading = 0, True
        announced = _header(scope, b"content-length")

        async def receive_within_limits() -> Message:
            nonlocal num_bytes, reading
            if not reading:  # only the disconnect is still to come; that may take as long as the answer
                return await receive()
            if announced.isdigit() and int(announced) > self._max_body_bytes:
                raise self._too_long()
            try:
                message = await asyncio.wait_for(receive(), deadline - loop.time())
            except TimeoutError:
                raise HTTPException(408, f"the request body did not arrive within {self._timeout_s:g} s") from None
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_body_bytes:
                raise self._too_long()
            reading = message.get("more_body", False)
            return message

        await self._app(scope, receive_within_limits, send)

    def _too_long(self) -> HTTPException:
        return HTTPException(413, f"the request body is longer than {self._max_body_bytes} bytes")
