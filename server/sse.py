"""Server-sent events: the exact bytes, and the response that sends them while somebody is listening.

An event is `data: {json}` and an empty line, the stream ends with `data: [DONE]`. JSON is pure ASCII: a raw U+2028 or
U+0085 inside it would be a line break to many clients. Knows nothing of completions.

Invariant: nothing is sent before there is something to say (first event, or `keep_alive_s` of silence), so a request
that fails early gets an ordinary error reply with its status; a later failure is one `{"error": …}` event, and the end.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import Response
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from server.connection import ClientConnection
from server.errors import ClientGone, reply_for

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"


def encode_event(data: BaseModel) -> bytes:
    """One event."""
    return b"data: " + data.model_dump_json(ensure_ascii=True).encode("ascii") + b"\n\n"


class EventStream(Response):
    """Sends the bytes of `events` as they come. Closes `events` when it ends, however it ends."""

    def __init__(self, events: AsyncGenerator[bytes, None], timeout_s: float, keep_alive_s: float) -> None:
        # without no-cache and X-Accel-Buffering, proxies hold events back
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(headers=headers, media_type="text/event-stream")
        del self.headers["content-length"]
        self._events, self._timeout_s, self._keep_alive_s = events, timeout_s, keep_alive_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._send, self._started = send, False
        async with aclosing(self._events), ClientConnection(receive, self._timeout_s) as client:
            try:
                await self._forward(client)
            except ClientGone:
                if not self._started:
                    raise
            except Exception as error:
                if not self._started:
                    raise
                reply = reply_for(error, scope["state"]["record"].request_id)
                await self._write(encode_event(reply.body))
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _forward(self, client: ClientConnection) -> None:
        while True:
            following = client.start(self._following())
            while not await client.is_done(following, self._keep_alive_s):
                await self._write(KEEP_ALIVE)
            event = following.result()
            if event is None:
                return
            await self._write(event)

    async def _following(self) -> bytes | None:
        return await anext(self._events, None)

    async def _write(self, body: bytes) -> None:
        if not self._started:
            self._started = True
            await self._send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await self._send({"type": "http.response.body", "body": body, "more_body": True})
