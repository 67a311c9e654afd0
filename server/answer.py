"""One question's way to its answer: retrieval in a thread, then the engine's events, as pieces of text.

Knows the rag, the worker and the request's record; knows nothing of HTTP and formats.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing

from fusionrag.errors import QueueFull
from fusionrag.rag import Prepared, Question, Rag, Source
from fusionrag.types import RequestStats, TokenEvent
from server.access_log import RequestRecord
from server.config import ServerConfig
from server.errors import Draining
from server.worker import Worker


class Preparation:
    """Retrieval and prompt building, off the event loop: a few threads and a bounded queue in front of them."""

    def __init__(self, rag: Rag, config: ServerConfig) -> None:
        self._rag, self._max_waiting = rag, config.max_preparing
        self._threads = ThreadPoolExecutor(config.num_prepare_threads, thread_name_prefix="prepare")
        self._num_waiting = 0

    async def prepare(self, question: Question, request_id: str) -> Prepared:
        """Raises QueueFull, or what `Rag.prepare` raises. A question whose asker has gone is not begun."""
        if self._num_waiting >= self._max_waiting:
            raise QueueFull(f"{self._num_waiting} questions wait for retrieval; try again later")
        self._num_waiting += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._threads, self._rag.prepare, question, request_id)
        finally:
            self._num_waiting -= 1

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


class Answer:
    """The answer to one question. `sources` are there with the first piece; the rest once the pieces have ended."""

    def __init__(
        self, question: Question, request_id: str, preparation: Preparation, worker: Worker, record: RequestRecord
    ) -> None:
        self._question, self._request_id = question, request_id
        self._preparation, self._worker, self.record = preparation, worker, record
        self.sources: tuple[Source, ...] = ()
        self.finish_reason = "stop"

    @property
    def stats(self) -> RequestStats:
        return self.record.stats or RequestStats()

    async def pieces(self) -> AsyncGenerator[str, None]:
        """The text, piece by piece, none of them empty. Close it to cancel; raises what went wrong."""
        try:
            self._worker.check_ready()
            prepared = await self._preparation.prepare(self._question, self._request_id)
            self.sources = prepared.sources
            async with aclosing(self._worker.stream(prepared.request)) as events:
                async for event in events:
                    self._note(event)
                    if event.text:
                        yield event.text
        except (asyncio.CancelledError, GeneratorExit):
            self.record.finish_reason = self.record.finish_reason or "cancelled"
            raise

    async def text(self) -> str:
        """All of it, once it is complete."""
        pieces = []
        async with aclosing(self.pieces()) as stream:
            async for piece in stream:
                self.record.mark_first_content()
                pieces.append(piece)
        return "".join(pieces)

    def _note(self, event: TokenEvent) -> None:
        self.record.stats = event.stats or self.record.stats
        if event.finish_reason == "error":
            raise event.error or RuntimeError("the engine gave up on a request without saying why")
        if event.finish_reason == "cancelled":
            raise Draining("the server stopped before the answer was finished")
        if event.finish_reason is not None:
            self.record.finish_reason = self.finish_reason = event.finish_reason
