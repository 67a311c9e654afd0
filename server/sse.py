"""Server-sent events: the exact bytes, and the response that sends them while somebody is listening.

An event is `data: {json}` and an empty line, behind a line `event: name` where it has a name; a stream of completions
ends with `data: [DONE]`. JSON is pure ASCII: a raw U+2028 or U+0085 inside it would be a line break to many clients.
Knows nothing of completions.

Invariant: nothing is sent before there is something to say (first event, or `keep_alive_s` of silence), so a request
that fails early gets an ordinary error reply with its status; what a later failure adds (one `{"error": …}` event,
unless the format has its own) is the end.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing

from fastapi import Response
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from server.connection import ClientConnection
from server.errors import ClientGone, ErrorReply, reply_for

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"


def encode_event(data: BaseModel, name: str = "") -> bytes:
    """One event."""
    head = f"event: {name}\ndata: " if name else "data: "
    return f"{head}{data.model_dump_json(ensure_ascii=True)}\n\n".encode("ascii")


def encode_failure(reply: ErrorReply) -> bytes:
    """The end of a stream that failed, in the form of completions."""
    return encode_event(reply.body)


class EventStream(Response):
    """Sends the bytes of `events` as they come. Closes `events` when it ends, however it ends.

    late_headers: headers that are known only when the first event is. failure: the bytes that tell of an error that
    came after it.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        timeout_s: float,
        keep_alive_s: float,
        late_headers: Callable[[], Mapping[str, str]] = dict,
        failure: Callable[[ErrorReply], bytes] = encode_failure,
    ) -> None:
        # without no-cache and X-Accel-Buffering, proxies hold events back
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(headers=headers, media_type="text/event-stream")
        del self.headers["content-length"]
        self._events, self._timeout_s, self._keep_alive_s = events, timeout_s, keep_alive_s
        self._late_headers, self._failure = late_headers, failure

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
                await self._write(self._failure(reply))
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
            self.headers.update(self._late_headers())
            await self._send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await self._send({"type": "http.response.body", "body": body, "more_body": True})
