"""One question's way to its answer: retrieval in a thread, then the engine's events, as pieces of text.

Knows the rag, the worker and the request's record; knows nothing of HTTP and formats.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import partial
from typing import ParamSpec, TypeVar

from fusionrag.errors import QueueFull
from fusionrag.rag import Prepared, Question, Rag, Source
from fusionrag.types import RequestStats, TokenEvent
from server.access_log import RequestRecord
from server.citations import CitationStyle, CitedPiece, Citer
from server.config import ServerConfig
from server.errors import Draining
from server.worker import Worker

P = ParamSpec("P")
T = TypeVar("T")


class Preparation:
    """All that blocks (retrieval, files, the catalogue), off the event loop: a few threads and a bounded queue."""

    def __init__(self, rag: Rag, config: ServerConfig) -> None:
        self._rag, self._max_waiting = rag, config.max_preparing
        self._threads = ThreadPoolExecutor(config.num_prepare_threads, thread_name_prefix="prepare")
        self._num_waiting = 0

    @property
    def is_full(self) -> bool:
        return self._num_waiting >= self._max_waiting

    async def prepare(self, question: Question, request_id: str) -> Prepared:
        """Raises QueueFull, or what `Rag.prepare` raises. A question whose asker has gone is not begun."""
        return await self.run(self._rag.prepare, question, request_id)

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What `function` returns or raises, computed in one of the threads; or QueueFull."""
        if self.is_full:
            raise QueueFull(f"{self._num_waiting} requests wait for retrieval; try again later")
        self._num_waiting += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._threads, partial(function, *args, **kwargs))
        finally:
            self._num_waiting -= 1

    def begin(self, function: Callable[[], None]) -> None:
        """Has `function` called in one of the threads, sometime soon. Nobody waits for it."""
        self._threads.submit(function)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


class Answer:
    """The answer to one question. `sources` are there with the first piece; the rest once the pieces have ended."""

    def __init__(
        self,
        question: Question,
        request_id: str,
        preparation: Preparation,
        worker: Worker,
        record: RequestRecord,
        citations: CitationStyle = "annotations",
    ) -> None:
        self._question, self._request_id = question, request_id
        self._preparation, self._worker, self.record = preparation, worker, record
        self._citations: CitationStyle = citations
        self._prepared: Prepared | None = None
        self.finish_reason = "stop"

    @property
    def sources(self) -> tuple[Source, ...]:
        return self._prepared.sources if self._prepared else ()

    @property
    def stats(self) -> RequestStats:
        return self.record.stats or RequestStats()

    @property
    def recomputed_text(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """For each source the characters [begin, end) of its text that were recomputed; empty where not asked for."""
        explained = self._prepared is not None and self._question.explain and bool(self.stats.chunks)
        return self._prepared.recomputed_text(self.stats.chunks) if self._prepared and explained else ()

    async def pieces(self) -> AsyncGenerator[CitedPiece, None]:
        """The text and its citations, piece by piece, none of them empty; only the last may be without text.

        Close it to cancel; raises what went wrong.
        """
        try:
            self._worker.check_ready()
            self._prepared = await self._preparation.prepare(self._question, self._request_id)
            asked = self._question.turns[-1].content if self._question.turns else ""
            citer = Citer(asked, self.sources, self._citations)
            self._preparation.begin(citer.read_sources)  # beside the prefill
            async with aclosing(self._worker.stream(self._prepared.request)) as events:
                async for event in events:
                    self._note(event)
                    if (piece := citer.add(event.text)).text:
                        yield piece
            if (piece := citer.finish()) != CitedPiece(""):
                yield piece
        except (asyncio.CancelledError, GeneratorExit):
            self.record.finish_reason = self.record.finish_reason or "cancelled"
            raise

    async def whole(self) -> CitedPiece:
        """All of it, once it is complete."""
        pieces = []
        async with aclosing(self.pieces()) as stream:
            async for piece in stream:
                self.record.mark_first_content()
                pieces.append(piece)
        return CitedPiece("".join(p.text for p in pieces), tuple(c for p in pieces for c in p.citations))

    def _note(self, event: TokenEvent) -> None:
        self.record.stats = event.stats or self.record.stats
        if event.finish_reason == "error":
            raise event.error or RuntimeError("the engine gave up on a request without saying why")
        if event.finish_reason == "cancelled":
            raise Draining("the server stopped before the answer was finished")
        if event.finish_reason is not None:
            self.record.finish_reason = self.finish_reason = event.finish_reason
