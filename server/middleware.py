"""What happens to every request before it meets a route: a record and an id, the key, the limits of head and body.

Plain ASGI, so that streams and disconnects pass through untouched. Deny by default: a new route needs a key.
"""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fusionrag.errors import RequestError
from server import access_log
from server.access_log import RequestRecord
from server.errors import ErrorReply, RequestTimeout, reply_for
from server.keys import KeyRing
from server.metrics import Metrics
from server.tracing import Tracing

# what a prober or a browser without a key may read; the page has no data of its own
OPEN_PATHS = ("/", "/health", "/ready")
OPEN_FOLDER = "/assets/"
TIMEOUT_HEADER = "X-Request-Timeout"
MAX_HEADERS = 100


def _header(scope: Scope, name: bytes) -> bytes:
    return next((value for key, value in scope["headers"] if key == name), b"")


class Recorder:
    """Outermost: gives each request an id and a record, and logs and counts it when it has ended, however it ends."""

    def __init__(self, app: ASGIApp, metrics: Metrics, tracing: Tracing | None = None) -> None:
        self._app, self._metrics, self._tracing = app, metrics, tracing

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
            if self._tracing is not None:
                self._tracing.observe(record, scope)
            access_log.write(record)


class LimitConnections:
    """Answers 503 to what comes on a connection too many, and closes it. A prober is answered all the same."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["state"].get("is_one_too_many") and not _is_open(scope):
            headers = {"Retry-After": "1", "Connection": "close"}
            raise HTTPException(503, "the server has as many connections as it takes; try again", headers=headers)
        await self._app(scope, receive, send)


class RequireKey:
    """Answers 401 to whoever does not bring a key, where keys are used; notes whose request it is."""

    def __init__(self, app: ASGIApp, keys: KeyRing) -> None:
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _is_open(scope):
            await self._app(scope, receive, send)
            return
        await self._keys.follow()
        owner = self._keys.owner(_header(scope, b"authorization")) if self._keys.is_locked else ""
        if owner is None:
            message = "a valid API key is needed: send it as 'Authorization: Bearer <key>'"
            headers = {"WWW-Authenticate": "Bearer"}
            reply = ErrorReply(401, message, "authentication_error", code="invalid_api_key", headers=headers)
            await reply.response()(scope, receive, send)
        else:
            scope["state"]["owner"] = owner
            await self._app(scope, receive, send)


def _is_open(scope: Scope) -> bool:
    path: str = scope["path"]
    return scope["method"] in ("GET", "HEAD") and (path in OPEN_PATHS or path.startswith(OPEN_FOLDER))


class RefuseForeignPages:
    """Answers 403 to what a page of another site makes a browser send, where no key protects the server.

    A form or script of any site can reach an address on the user's own machine, and a name that its owner points at
    that address (DNS rebinding) makes the two one site to the browser. hosts: the names under which a server on
    loopback is reached; None: any, because it listens to the network anyway.
    """

    def __init__(self, app: ASGIApp, keys: KeyRing, hosts: frozenset[str] | None) -> None:
        self._app, self._keys, self._hosts = app, keys, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._keys.is_locked:
            name = re.sub(rb":\d*$", b"", _header(scope, b"host")).decode("latin-1").strip("[]").lower()
            if _header(scope, b"sec-fetch-site") in (b"cross-site", b"same-site"):
                raise HTTPException(403, "a page of another site may not use a server without API keys")
            if self._hosts is not None and name and name not in self._hosts:
                raise HTTPException(
                    403, f"a server without API keys is not reached as {name[:100]!r}; name it in allowed_hosts"
                )
        await self._app(scope, receive, send)


class LimitHead:
    """Refuses a head with too many fields (431), and keeps the deadline that a head may ask for (504).

    `state.timeout_s` is the time that the request has: the server's own limit, or less where the client asked for
    less. A reply that has not begun by a deadline that was asked for is given up here; what comes after its beginning
    is for whoever sends it.
    """

    def __init__(self, app: ASGIApp, timeout_s: float) -> None:
        self._app, self._timeout_s = app, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if len(scope["headers"]) > MAX_HEADERS:
            raise HTTPException(431, f"the request has more than {MAX_HEADERS} header fields")
        asked_s = _asked_timeout_s(_header(scope, TIMEOUT_HEADER.lower().encode()))
        timeout_s = scope["state"]["timeout_s"] = min(asked_s or self._timeout_s, self._timeout_s)

        async def send_in_time(message: Message) -> None:
            if not deadline.expired():
                deadline.reschedule(None)
            await send(message)

        try:
            async with asyncio.timeout(timeout_s if asked_s else None) as deadline:
                await self._app(scope, receive, send_in_time)
        except TimeoutError:
            if not deadline.expired():
                raise
            raise RequestTimeout(f"the answer was not begun within {timeout_s:g} s and was given up") from None


def _asked_timeout_s(value: bytes) -> float | None:
    if not value:
        return None
    if not re.fullmatch(rb"\d{1,6}(\.\d{1,6})?", value) or not float(value):
        raise RequestError(f"{TIMEOUT_HEADER} must be a positive number of seconds, e.g. 2.5", TIMEOUT_HEADER)
    return float(value)


@dataclass(frozen=True)
class BodyLimits:
    """How long a body may be, and how long it may take."""

    max_bytes: int
    timeout_s: float


class LimitBody:
    """Refuses a body that is too long (413), while reading it for its length may be a lie, or too slow (408).

    special: the limits of those methods and paths that have their own.
    """

    def __init__(self, app: ASGIApp, limits: BodyLimits, special: Mapping[tuple[str, str], BodyLimits]) -> None:
        self._app, self._limits, self._special = app, limits, special

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        loop = asyncio.get_running_loop()
        limits = self._special.get((scope["method"], scope["path"]), self._limits)
        deadline = loop.time() + limits.timeout_s
        num_bytes, reading = 0, True
        announced = _header(scope, b"content-length")

        async def receive_within_limits() -> Message:
            nonlocal num_bytes, reading
            if not reading:  # only the disconnect is still to come; that may take as long as the answer
                return await receive()
            if announced.isdigit() and int(announced) > limits.max_bytes:
                raise _too_long(limits)
            try:
                message = await asyncio.wait_for(receive(), deadline - loop.time())
            except TimeoutError:
                raise HTTPException(408, f"the request body did not arrive within {limits.timeout_s:g} s") from None
            num_bytes += len(message.get("body", b""))
            if num_bytes > limits.max_bytes:
                raise _too_long(limits)
            reading = message.get("more_body", False)
            return message

        await self._app(scope, receive_within_limits, send)


def _too_long(limits: BodyLimits) -> HTTPException:
    return HTTPException(413, f"the request body is longer than {limits.max_bytes} bytes")
